"""Several trainings in one process over one frozen base: joint passes, everything else apart.

Each training keeps its own course: order of examples, loss mean, clipping, optimiser, schedule,
validation, guard. Joint is the pass through the base alone. The rows of a joint batch do not
mix, and every trial's weights meet its own rows only, so that the gradient of the sum of the
trials' losses holds for each trial the gradient that it would have alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from adaptive_lora.adapters.attach import lora_layers
from adaptive_lora.adapters.dropout import set_dropout_step
from adaptive_lora.adapters.grouped import GroupedSite, Layers, Routing, Share, mount
from adaptive_lora.data.batches import Batch, stacked
from adaptive_lora.errors import TrialFailed
from adaptive_lora.losses import losses_by_example
from adaptive_lora.training.loop import Course
from adaptive_lora.training.short_memory import is_out_of_memory


@dataclass(kw_only=True)
class Member:
    """One training of a group."""

    course: Course
    layers: Layers = field(init=False)
    """What stands in the base while this training has it alone."""
    failure: TrialFailed | None = None
    """Why it ended early, if it did."""

    def __post_init__(self) -> None:
        """Take note of the adapters, which are on the base now."""
        self.layers = lora_layers(self.course.model)

    @property
    def bare(self) -> Mapping[str, nn.Module]:
        """The base's own modules at the sites."""
        return {name: layer.get_base_layer() for name, layer in self.layers.items()}

    @property
    def active(self) -> bool:
        """Whether it has steps to take."""
        return self.failure is None and not self.course.finished


class JointTraining:
    """Trains a group of members to their ends; between passes the base is bare."""

    def __init__(self, base: nn.Module, members: Sequence[Member]) -> None:
        """Prepare a group.

        Args:
            base: bare; each member's adapters fit it.
            members: each with a course that has not begun, or that was put back to a snapshot.
        """
        self._base, self._members = base, members
        self._bare = {name: module for member in members for name, module in member.bare.items()}
        self._routing = Routing()
        self._joint = {
            name: GroupedSite(
                module,
                {i: m.layers[name] for i, m in enumerate(members) if name in m.layers},
                self._routing,
            )
            for name, module in self._bare.items()
        }

    def run(self) -> None:
        """Take all steps of all members; a failed one does not stop the others."""
        for member in self._members:
            with self._alone(member):
                member.course.start()
        while active := [i for i, member in enumerate(self._members) if member.active]:
            self._step(active)
        for member in self._members:
            if member.failure is None:
                member.course.early.restore_best(member.course.parameters)

    def _step(self, active: Sequence[int]) -> None:
        """Take one optimiser step of each active member."""
        courses = {i: self._members[i].course for i in active}
        started = time.perf_counter()
        windows = {i: course.next_window() for i, course in courses.items()}
        losses = self._learn(windows)
        seconds = time.perf_counter() - started
        tokens = {i: sum(batch.tokens for batch in window) for i, window in windows.items()}
        for i, course in courses.items():
            with self._alone(self._members[i]):
                started = time.perf_counter()
                try:
                    course.apply(windows[i], losses[i])
                except TrialFailed as failure:
                    self._members[i].failure = failure
                    continue
                course.seconds += time.perf_counter() - started
                course.seconds += seconds * tokens[i] / sum(tokens.values())
                course.report()

    def _learn(self, windows: Mapping[int, Sequence[Batch]]) -> dict[int, float]:
        """Form the gradients of a step of some members; return each one's loss.

        Out of memory, the group is divided; a member left alone divides its own batch.
        """
        if len(windows) == 1:
            ((i, window),) = windows.items()
            with self._alone(self._members[i]):
                return {i: self._members[i].course.learn(window)}
        passes = {i: self._members[i].course.forward_passes for i in windows}
        try:
            return self._joint_passes(windows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        for i in windows:
            self._members[i].course.optimizer.zero_grad()
            self._members[i].course.forward_passes = passes[i]
        order = list(windows)
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        return {
            i: loss
            for half in halves
            for i, loss in self._learn({i: windows[i] for i in half}).items()
        }

    def _joint_passes(self, windows: Mapping[int, Sequence[Batch]]) -> dict[int, float]:
        """Run the batches of some members through the base together; `accumulation` passes."""
        supervised = {i: sum(b.supervised_tokens for b in w) for i, w in windows.items()}
        totals = dict.fromkeys(windows, 0.0)
        any_course = self._members[next(iter(windows))].course
        with self._mounted(self._joint):
            self._base.train()
            for batches in zip(*windows.values(), strict=True):
                own = dict(zip(windows, batches, strict=True))
                losses = self._losses(own)
                any_course.runtime.accelerator.backward(
                    torch.stack([loss / supervised[i] for i, loss in losses.items()]).sum()
                )
                for i, loss in losses.items():
                    totals[i] += float(loss.detach() / supervised[i])
                    self._members[i].course.forward_passes += 1
        return totals

    def _losses(self, batches: Mapping[int, Batch]) -> dict[int, torch.Tensor]:
        """Run one batch of each member through the base; return each one's summed loss."""
        self._routing.shares = [
            Share(member=i, rows=len(batch.input_ids), width=batch.input_ids.shape[1])
            for i, batch in batches.items()
        ]
        for i in batches:
            course = self._members[i].course
            for layer in self._members[i].layers.values():
                set_dropout_step(layer, course.forward_passes)
        sizes = [share.rows for share in self._routing.shares]
        with self._members[0].course.runtime.accelerator.autocast():
            losses = losses_by_example(self._base, stacked(list(batches.values())))
        return {i: own.sum() for i, own in zip(batches, losses.split(sizes), strict=True)}

    @contextmanager
    def _mounted(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Have modules in the base inside the block, the bare ones after it."""
        mount(self._base, modules)
        try:
            yield
        finally:
            mount(self._base, {name: self._bare[name] for name in modules})

    def _alone(self, member: Member) -> AbstractContextManager[None]:
        """Have one member's adapters on the base inside the block."""
        return self._mounted(member.layers)
