"""The training of one trial: equal for all methods, so that only the plan differs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from adaptive_lora.config import TrainConfig
from adaptive_lora.data import Batch, training_batches
from adaptive_lora.errors import AdapterError, brief
from adaptive_lora.interruption import whole
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.dropout import set_dropout_step
from adaptive_lora.models.device import Runtime
from adaptive_lora.results import TrainResult
from adaptive_lora.seeding import global_state, set_global_state, stream_key, torch_stream
from adaptive_lora.training.inputs import StepEvent, TrainInputs, is_validated, total_steps
from adaptive_lora.training.joint.group import take_steps_with_group
from adaptive_lora.training.memory.peak import PeakMemory
from adaptive_lora.training.memory.shortage import halved, is_out_of_memory, too_large
from adaptive_lora.training.state import StepStart, TrainerState, copied
from adaptive_lora.training.stopping import EarlyStop, StabilityGuard


def parameter_groups(
    model: nn.Module, multipliers: Mapping[str, float], lr: float, *, lora_plus: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups, one per learning rate.

    Without multipliers there is one group, in the model's order. A schedule scales every group
    from its own peak rate. AdamW multiplies weight decay by the rate, so it is scaled too.

    Args:
        model: adapted model.
        multipliers: site name -> factor of its rate; other sites have 1.
        lr: peak learning rate.
        lora_plus: additional factor of every B (LoRA+, 2402.12354).
    """
    factor_of: dict[int, float] = {}
    for name, layer in lora_layers(model).items() if multipliers or lora_plus != 1 else ():
        factor = multipliers.get(name, 1.0)
        factor_of |= {id(parameter): factor for parameter in layer.parameters()}
        if lora_plus != 1:
            factor_of[id(layer.lora_B[ADAPTER].weight)] = factor * lora_plus
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * factor} for factor, members in groups.items()]


_COUNTERS = ("tokens", "supervised", "seconds", "reported", "micro_batch")
_LISTS = ("losses", "validation", "step_tokens")
"""Attributes of a trainer that are part of its state as they are."""


class Trainer:
    """One training: model, optimiser and measurements so far."""

    def __init__(
        self, model: nn.Module, inputs: TrainInputs, config: TrainConfig, runtime: Runtime, *, lr: float, seed: int
    ) -> None:
        """Prepare the training of a model's trainable parameters, in place.

        Args:
            model: adapted model.
            inputs: examples, validation and progress.
            config: settings of the optimisation, equal for all methods.
            runtime: device and precision.
            lr: peak learning rate.
            seed: seed of the order of examples and of the base model's own dropout.
        """
        self.config, self.inputs, self.runtime, self._seed = config, inputs, runtime, seed
        self.raw_optimizer = torch.optim.AdamW(
            parameter_groups(model, inputs.lr_multipliers, lr, lora_plus=inputs.lora_plus),
            lr=lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = runtime.prepare(model, self.raw_optimizer)
        runtime.processes.start_equal(self.parameters)
        self.steps, self.callback = total_steps(len(inputs.examples), config), inputs.callback
        self.callback.start(self.raw_optimizer, self.steps)
        self.scheduler = get_scheduler(
            config.schedule, self.raw_optimizer, round(config.warmup_share * self.steps), self.steps
        )
        self.batches = training_batches(
            inputs.examples, batch_size=config.batch_size, seed=seed, collate=inputs.collate
        )
        scaled = runtime.accelerator.scaler is not None
        self.guard = StabilityGuard(config.max_skipped_steps, gradient_scaler=scaled)
        self.early = EarlyStop(config.patience)
        self.memory = PeakMemory(runtime.device, model)
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.tokens = self.supervised = self.forward_passes = 0
        self.micro_batch = min(inputs.micro_batch or config.batch_size, config.batch_size)
        self.step_tokens: list[int] = []
        self.order = hashlib.sha256()
        self.batches_drawn = self.reported = 0
        self.trials_together, self.waited_seconds = 1, 0.0
        self.seconds = 0.0
        self._step_start = self._between_steps()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters trained now; a callback may have replaced some."""
        return [p for group in self.raw_optimizer.param_groups for p in group["params"]]

    @property
    def finished(self) -> bool:
        """State of the training: true once all steps have been taken."""
        return len(self.losses) >= self.steps or self.early.stop

    def run(self) -> TrainResult:
        """Take all steps, or fewer if early stopping ends the training; continue from a snapshot if there is one.

        Raises:
            TrialFailed: there were too many non-finite steps.
        """
        try:
            others = [index] if (index := self.runtime.processes.index) else []
            with torch_stream(self._seed, "base dropout", *others), self.inputs.running(self.model):
                if self.inputs.resume is not None:
                    self.load_state_dict(self.inputs.resume)
                with self._snapshot_at_end():
                    self.start()
                    take_steps_with_group(self)  # a trial of a joint group has no steps left after this
                    while not self.finished:
                        started = time.perf_counter()
                        window = self.next_window()
                        loss = self.learn(window)
                        with whole():
                            self.apply(window, loss)
                            self.seconds += time.perf_counter() - started
                        self.report()
                    self.early.restore_best(self.parameters)
        finally:
            self.runtime.accelerator.free_memory()
        return self.result()

    @contextmanager
    def _snapshot_at_end(self) -> Iterator[None]:
        """Offer a snapshot where the block ends or is interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            self.inputs.on_stop(len(self.losses), self.state_dict)
            raise
        self.inputs.on_stop(len(self.losses), self.state_dict)

    def start(self) -> None:
        """Validate the untrained model at the start; complete a step that was interrupted."""
        self._step_start = self._between_steps()
        self.model.train()  # PEFT's wrapper starts in training mode, the base inside it does not
        if not self.validation:
            self._validate(0)
        if self.reported < len(self.losses):
            self.report()

    def next_window(self) -> list[Batch]:
        """Return the batches of the next optimiser step."""
        if not self.model.training:
            self.model.train()
        return [self.next_batch() for _ in range(self.config.accumulation)]

    def learn(self, window: Sequence[Batch]) -> float:
        """Compute the gradient of a step; return its loss in nats per supervised token.

        If memory is short, the step is repeated with half as many examples per forward pass. Loss and
        gradient remain sums over the examples of the step, so only the order of additions changes
        (about 1e-7), and dropout masks, if there is dropout.
        """
        passes, random = self.forward_passes, global_state()
        while True:
            try:
                loss = self._forward_and_backward(window)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            self.optimizer.zero_grad()  # after the except block: its traceback held activations
            if self.micro_batch == 1 or self.runtime.processes.sharded:  # the other processes are in the same pass
                raise too_large(reason)
            self.micro_batch = halved(self.micro_batch, what="examples per forward pass")
            self.forward_passes = passes
            set_global_state(random)
        self.runtime.processes.sum_gradients(self.parameters)
        return self.runtime.processes.total(loss)

    def _forward_and_backward(self, window: Sequence[Batch]) -> float:
        supervised = sum(batch.supervised_tokens for batch in window)  # of all processes, so that shares add up
        processes, total = self.runtime.processes, 0.0
        for batch in window:
            for part, counts in processes.parts(batch, self.micro_batch):
                set_dropout_step(self.model, self.forward_passes * processes.count + processes.index)
                with self.runtime.accelerator.autocast():
                    loss = self.inputs.loss(self.model, part) / supervised
                if not counts:
                    loss = loss * 0
                self.runtime.accelerator.backward(loss)
                total += float(loss.detach())
            self.forward_passes += 1
        return total

    def apply(self, window: Sequence[Batch], loss: float) -> None:
        """Take an optimiser step with the accumulated gradient, unless it is not finite."""
        accelerator, step = self.runtime.accelerator, len(self.losses) + 1
        penalty = self.callback.penalty()
        if penalty is not None:
            accelerator.backward(penalty)
        norm = float(accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf))
        allowed = self.guard.allows(step, loss, norm)
        if not (allowed or self.guard.gradient_scaler):
            self.optimizer.zero_grad()  # the step below then changes nothing
        self.optimizer.step()  # a gradient scaler skips overflowed steps itself and lowers its scale
        self.callback.stepped(step, taken=allowed)
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.tokens += sum(batch.tokens for batch in window)
        self.step_tokens.append(self.tokens)
        self.supervised += sum(batch.supervised_tokens for batch in window)
        self.losses.append(loss if allowed else math.nan)
        self._step_start = self._between_steps()

    def report(self) -> None:
        """Validate if it is due, and report the step just taken."""
        step = len(self.losses)
        due = is_validated(step, self.steps, self.config.validations)
        loss = self._validate(step) if due else None
        with whole(), self.runtime.processes.alike():
            self.reported = step
            self.inputs.on_step(
                StepEvent(
                    step=step, total_steps=self.steps, loss=self.losses[-1], tokens=self.tokens, validation_loss=loss
                )
            )
        self.inputs.on_snapshot(step, self.state_dict)

    def _validate(self, step: int) -> float:
        """Return the validation loss, measured once per step even if a stop came in between."""
        if self.validation and self.validation[-1][0] == step:
            return self.validation[-1][1]
        loss = self.inputs.validate(self.model)
        with whole():
            self.validation.append((step, loss))
            if step > 0 and self.callback.settled(step):  # the untrained adapter is no candidate
                self.early.see(loss, self.parameters)
            self._step_start = self._between_steps()
        return loss

    def next_batch(self) -> Batch:
        """Return the next batch of the seed's order."""
        batch = next(self.batches)
        self.batches_drawn += 1
        self.order.update(batch.content())
        return batch.to(self.runtime.device)

    def result(self) -> TrainResult:
        """Return the result of the training."""
        return TrainResult(
            losses=tuple(self.losses),
            validation_curve=tuple(self.validation),
            validation_loss=self.early.kept_loss,
            tokens=self.tokens,
            step_tokens=tuple(self.step_tokens),
            order_digest=self.order.hexdigest()[:16],
            supervised_tokens=self.supervised,
            seconds=self.seconds,
            peak_memory_bytes=self.memory.bytes,
            micro_batch=self.micro_batch,
            trials_together=self.trials_together,
            waited_seconds=self.waited_seconds,
            skipped_steps=self.guard.skipped,
            stopped_early=len(self.losses) < self.steps,
            precision=self.runtime.precision,
            device=str(self.runtime.device),
        )

    def state_dict(self) -> TrainerState:
        """Return a copy of everything that the next steps depend on or the result reports.

        Within a step, before its weights change, this is the state at the end of the previous step.
        """
        scaler = self.runtime.accelerator.scaler
        state: TrainerState = copied(
            {
                "weights": {n: p for n, p in self.model.named_parameters() if p.requires_grad},
                "optimizer": self.raw_optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "regime": self.callback.state(),
                "early": self.early.state(),
                "random": self._step_start.random,
                "batches_drawn": self._step_start.batches_drawn,
                "forward_passes": self._step_start.forward_passes,
                "skipped": self.guard.skipped,
                **{name: getattr(self, name) for name in (*_COUNTERS, *_LISTS)},
            }
        )
        return state

    def load_state_dict(self, snapshot: TrainerState) -> None:
        """Restore a new trainer of the same training from a snapshot.

        Raises:
            AdapterError: the snapshot does not fit the training, because it was changed.
        """
        try:
            self._restore(copied(snapshot))
        except (
            KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError,
        ) as error:  # fmt: skip
            if is_out_of_memory(error):
                raise
            raise AdapterError(
                f"a checkpoint does not fit its training ({brief(error)}), so it was changed after it was "
                "written. Remove the trial's folder of checkpoints (--checkpoints); the same command then "
                "restarts the trial."
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore all values; the callback is first, because it gives parameters their shapes."""
        self.callback.restore(state["regime"])
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(state["weights"][name])
        self.raw_optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.runtime.accelerator.scaler is not None:
            self.runtime.accelerator.scaler.load_state_dict(state["scaler"])
        self.early.restore(state["early"])
        if state["batches_drawn"] > self.steps * self.config.accumulation:
            raise ValueError(f"{state['batches_drawn']} batches of {self.steps} steps")
        while self.batches_drawn < state["batches_drawn"]:
            self.next_batch()  # the digest of the order covers all batches
        self.forward_passes = state["forward_passes"]
        self.guard.skipped = state["skipped"]
        for name in (*_COUNTERS, *_LISTS):
            setattr(self, name, state[name])
        if self.runtime.processes.leads:
            set_global_state(state["random"])
        else:  # the snapshot has the first process's generators; this one's masks need others
            torch.manual_seed(stream_key(self._seed, "base dropout", self.runtime.processes.index, len(self.losses)))
        self._step_start = self._between_steps()

    def _between_steps(self) -> StepStart:
        """Return what the next step changes before any weight."""
        return StepStart(random=global_state(), batches_drawn=self.batches_drawn, forward_passes=self.forward_passes)
