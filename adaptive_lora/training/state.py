"""Where a training stands: enough to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adaptive_lora.errors import AdapterError, brief
from adaptive_lora.seeding import GlobalState, global_state, set_global_state
from adaptive_lora.training.memory.shortage import is_out_of_memory

if TYPE_CHECKING:
    from adaptive_lora.training.trainer import Trainer

TrainerState = Mapping[str, Any]
"""Tensors and plain values, in nested mappings, lists and tuples."""

_COUNTERS = ("tokens", "supervised", "seconds", "reported", "micro_batch")
_LISTS = ("losses", "validation", "step_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStart:
    """What a step uses up before it changes any weight: where a step cut in two begins anew."""

    random: GlobalState
    batches_drawn: int
    forward_passes: int


def step_start_of(trainer: Trainer) -> StepStart:
    """Return where a course stands between two steps."""
    return StepStart(random=global_state(), batches_drawn=trainer.batches_drawn, forward_passes=trainer.forward_passes)


def take(trainer: Trainer) -> TrainerState:
    """Return a copy of all that the next step depends on or that the result reports.

    Within a step, before its weights change, this is the end of the step before.
    """
    step_start = trainer.step_start
    state: TrainerState = _copied(
        {
            "weights": {n: p for n, p in trainer.model.named_parameters() if p.requires_grad},
            "optimizer": trainer.raw_optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": _scaler(trainer).state_dict() if _scaler(trainer) is not None else None,
            "regime": trainer.callback.state(),
            "early": trainer.early.state(),
            "random": step_start.random,
            "batches_drawn": step_start.batches_drawn,
            "forward_passes": step_start.forward_passes,
            "skipped": trainer.guard.skipped,
            **{name: getattr(trainer, name) for name in (*_COUNTERS, *_LISTS)},
        }
    )
    return state


def load_state_dict(trainer: Trainer, snapshot: TrainerState) -> None:
    """Bring a fresh course of the same training to where a snapshot was taken.

    Raises:
        AdapterError: the snapshot is of no such training, since somebody changed it.
    """
    try:
        _load_state_dict(trainer, _copied(snapshot))
    except (
        KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        raise AdapterError(
            f"a checkpoint does not fit the training that it is of ({brief(error)}), so it is not "
            "as it was written. Remove the trial's folder of checkpoints (--checkpoints); the same "
            "command then begins the trial anew."
        ) from error


def _load_state_dict(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put back the parts; the regime goes first: it gives parameters the shapes of then."""
    trainer.callback.restore(state["regime"])
    weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["weights"][name])
    trainer.raw_optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    if _scaler(trainer) is not None:
        _scaler(trainer).load_state_dict(state["scaler"])
    trainer.early.restore(state["early"])
    if state["batches_drawn"] > trainer.steps * trainer.config.accumulation:
        raise ValueError(f"{state['batches_drawn']} batches of {trainer.steps} steps")
    while trainer.batches_drawn < state["batches_drawn"]:
        trainer.next_batch()  # the digest of the order is that of all batches
    trainer.forward_passes = state["forward_passes"]
    trainer.guard.skipped = state["skipped"]
    for name in (*_COUNTERS, *_LISTS):
        setattr(trainer, name, state[name])
    set_global_state(state["random"])
    trainer.step_start = step_start_of(trainer)


def is_snapshot(value: Any) -> bool:
    """Return whether a value has the parts that are read before a training goes on."""
    try:
        losses, tokens, reported = value["losses"], value["step_tokens"], value["reported"]
        validation = dict(value["validation"])
        numbers = [*losses, *tokens, *validation, *validation.values(), reported]
        known = 0 <= reported <= min(len(losses), len(tokens))
    except (KeyError, TypeError, ValueError):
        return False
    return known and all(isinstance(number, int | float) for number in numbers)


def steps_of(snapshot: TrainerState) -> int:
    """Return the optimiser steps that a snapshot holds."""
    return len(snapshot["losses"])


def _scaler(trainer: Trainer) -> Any:
    return trainer.runtime.accelerator.scaler


def _copied(value: Any) -> Any:
    """Copy tensors and containers, so that neither side changes the other."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
