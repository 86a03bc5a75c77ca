"""Several trainings in one process on one frozen base: joint passes, everything else separate.

Each training keeps its own trainer: order of examples, loss mean, clipping, optimiser, schedule,
validation, guard. Only the pass through the base is joint. The rows of a joint batch do not mix, and
every trial's weights act on its own rows only, so that the gradient of the sum of the trials' losses
gives each trial the gradient that it would have alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptive_lora.config import shown
from adaptive_lora.data.batches import Batch, stacked
from adaptive_lora.errors import TrialFailed
from adaptive_lora.interruption import whole
from adaptive_lora.methods.adapters.dropout import set_dropout_step
from adaptive_lora.methods.base import TrainerCallback
from adaptive_lora.models.kernels import attends_packed
from adaptive_lora.training.joint.grouped import GroupedSite, Layers, Routing, Share, grouping_problem, mount
from adaptive_lora.training.memory.estimate import SPREAD, Estimate
from adaptive_lora.training.memory.shortage import halved, is_out_of_memory

if TYPE_CHECKING:
    from adaptive_lora.training.trainer import Trainer


def joining_problem(trainer: Trainer) -> str | None:
    """Return why a training cannot take its steps together with others, or None."""
    if trainer.inputs.losses_by_example is None:
        return "the task has no loss by example"
    if type(trainer.callback) is not TrainerCallback:
        return "the method changes its ranks in training"
    if trainer.runtime.accelerator.scaler is not None:
        return "fp16 scales gradients by one factor for all"
    if trainer.config.gradient_checkpointing:
        return "gradient checkpointing"
    return grouping_problem(trainer.model)


@dataclass(kw_only=True)
class Member:
    """One training of a group."""

    trainer: Trainer
    layers: Layers
    """LoRA layers placed into the base while this training uses it alone."""
    failure: TrialFailed | None = None
    """Reason of an early end, or None."""
    own_seconds: float = 0.0
    """Wall time in seconds of its share of the joint passes and of work for it alone."""

    @property
    def active(self) -> bool:
        """State of the training: true while steps are left."""
        return self.failure is None and not self.trainer.finished


@contextmanager
def _clocked(member: Member) -> Iterator[None]:
    """Add the block's wall time to the member's own."""
    started = time.perf_counter()
    try:
        yield
    finally:
        member.own_seconds += time.perf_counter() - started


class JointTraining:
    """Trains a group of members to the end; between passes the base has no adapters."""

    def __init__(self, members: Sequence[Member]) -> None:
        """Prepare a group.

        Args:
            members: at least one, on one base without adapters, each with a trainer whose next action
                is a step.
        """
        self._members = members
        model: Any = members[0].trainer.model
        self._base: nn.Module = model.get_base_model()
        self._bare = {name: layer.get_base_layer() for member in members for name, layer in member.layers.items()}
        self._routing = Routing()
        trainer = members[0].trainer
        self._most = passes_at_once(
            [member.trainer.inputs.memory for member in members],
            limit=trainer.config.max_memory,
            device=trainer.runtime.device,
        )
        self._joint = {
            name: GroupedSite(
                module, {i: m.layers[name] for i, m in enumerate(members) if name in m.layers}, self._routing
            )
            for name, module in self._bare.items()
        }

    def run(self) -> None:
        """Take all steps of all members; a failed one does not stop the others."""
        for member in self._members:
            member.trainer.trials_together = len(self._members)
        while active := [i for i, member in enumerate(self._members) if member.active]:
            self._step(active)

    def _step(self, active: Sequence[int]) -> None:
        """Take one optimiser step of each active member."""
        trainers = {i: self._members[i].trainer for i in active}
        started = time.perf_counter()
        windows = {i: trainer.next_window() for i, trainer in trainers.items()}
        losses = self._learn(windows)
        seconds = time.perf_counter() - started
        tokens = {i: sum(batch.tokens for batch in window) for i, window in windows.items()}
        for i, loss in losses.items():
            share = seconds * tokens[i] / sum(tokens.values())
            self._members[i].own_seconds += share
            trainers[i].seconds += share
            self._apply(self._members[i], windows[i], loss)

    def _apply(self, member: Member, window: Sequence[Batch], loss: float) -> None:
        """Let a member take its step with the accumulated gradient."""
        with self._alone(member), _clocked(member):
            started = time.perf_counter()
            try:
                with whole():
                    member.trainer.apply(window, loss)
                    member.trainer.seconds += time.perf_counter() - started
            except TrialFailed as failure:
                member.failure = failure
                return
            member.trainer.report()

    def _learn(self, windows: Mapping[int, Sequence[Batch]]) -> dict[int, float]:
        """Compute the gradients of a step of some members; return the loss of each that has one.

        After running out of memory, fewer members run at once; a single member divides its own batch.
        """
        losses: dict[int, float] = {}
        left = list(windows)
        while left:
            some = {i: windows[i] for i in left[: self._most]}
            found = self._alone_or_together(some)
            if found is None:
                self._most = halved(len(some), what="trials per forward pass")
                continue
            losses |= found
            left = left[len(some) :]
        return losses

    def _alone_or_together(self, windows: Mapping[int, Sequence[Batch]]) -> dict[int, float] | None:
        """Return the losses of a step of some members, or None if memory was short."""
        if len(windows) == 1:
            ((i, window),) = windows.items()
            member = self._members[i]
            try:
                with self._alone(member):
                    member.trainer.model.train()
                    return {i: member.trainer.learn(window)}
            except TrialFailed as failure:
                member.failure = failure
                return {}
        passes = {i: self._members[i].trainer.forward_passes for i in windows}
        try:
            return self._joint_passes(windows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        for i in windows:
            self._members[i].trainer.optimizer.zero_grad()
            self._members[i].trainer.forward_passes = passes[i]
        return None

    def _joint_passes(self, windows: Mapping[int, Sequence[Batch]]) -> dict[int, float]:
        """Run the batches of some members through the base together; `accumulation` passes."""
        supervised = {i: sum(b.supervised_tokens for b in w) for i, w in windows.items()}
        totals = dict.fromkeys(windows, 0.0)
        any_trainer = self._members[next(iter(windows))].trainer
        with self._mounted(self._joint), any_trainer.inputs.running(self._base):
            self._base.train()
            for batches in zip(*windows.values(), strict=True):
                own = dict(zip(windows, batches, strict=True))
                losses = self._losses(own)
                any_trainer.runtime.accelerator.backward(
                    torch.stack([loss / supervised[i] for i, loss in losses.items()]).sum()
                )
                for i, loss in losses.items():
                    totals[i] += float(loss.detach() / supervised[i])
                    self._members[i].trainer.forward_passes += 1
        return totals

    def _losses(self, batches: Mapping[int, Batch]) -> dict[int, torch.Tensor]:
        """Run one batch of each member through the base; return each one's summed loss."""
        packed = attends_packed(self._base)  # then every token is its own row
        self._routing.shares = [
            Share(member=i, rows=batch.tokens, width=1)
            if packed
            else Share(member=i, rows=batch.examples, width=batch.positions)
            for i, batch in batches.items()
        ]
        for i in batches:
            trainer = self._members[i].trainer
            for layer in self._members[i].layers.values():
                set_dropout_step(layer, trainer.forward_passes)
        sizes = [batch.examples for batch in batches.values()]
        trainer = self._members[0].trainer
        assert trainer.inputs.losses_by_example is not None
        with trainer.runtime.accelerator.autocast():
            losses = trainer.inputs.losses_by_example(self._base, stacked(list(batches.values())))
        return {i: own.sum() for i, own in zip(batches, losses.split(sizes), strict=True)}

    @contextmanager
    def _mounted(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Place modules into the base inside the block, and restore the base's own afterwards."""
        mount(self._base, modules)
        try:
            yield
        finally:
            mount(self._base, {name: self._bare[name] for name in modules})

    def _alone(self, member: Member) -> AbstractContextManager[None]:
        """Place one member's adapters into the base inside the block."""
        return self._mounted(member.layers)


def passes_at_once(estimates: Sequence[Estimate | None], *, limit: int | None, device: torch.device) -> int:
    """Return the number of trials whose batches fit into one forward pass, for any choice of trials.

    The base's weights count once, everything else once per trial. Without an estimate, and on a CPU
    without a limit, all trials are tried at once, and halved if memory is short.

    Args:
        estimates: memory of each trial's whole batch in one forward pass.
        limit: bytes that training may use, including weights; None: a GPU's free memory.
        device: training device.
    """
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return len(estimates)
    if limit is not None:
        room: float = limit - known[0].weights
    elif device.type == "cuda":
        room = free_bytes(device)  # the weights are already loaded
    else:
        return len(estimates)
    most = 0
    for estimate in sorted(known, key=lambda each: -each.share):
        room -= SPREAD * estimate.share
        most += room >= 0
    if most < len(estimates):
        logging.getLogger(__name__).warning(
            "%d of %d trials are trained at once: a batch takes up to %s in addition to the base",
            max(1, most),
            len(estimates),
            shown(int(SPREAD * max(each.share for each in known))),
        )
    return max(1, most)  # a single trial divides its batch


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, including those that torch has cached."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept
