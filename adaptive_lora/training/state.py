"""The state of a training: everything needed to continue as if it had never stopped."""

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
    """State that a step changes before any weight, from which an interrupted step is repeated."""

    random: GlobalState
    batches_drawn: int
    forward_passes: int


def step_start_of(trainer: Trainer) -> StepStart:
    """Return the state of a trainer between two steps."""
    return StepStart(random=global_state(), batches_drawn=trainer.batches_drawn, forward_passes=trainer.forward_passes)


def take(trainer: Trainer) -> TrainerState:
    """Return a copy of everything that the next steps depend on or the result reports.

    Within a step, before its weights change, this is the state at the end of the previous step.
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
    """Restore a new trainer of the same training from a snapshot.

    Raises:
        AdapterError: the snapshot does not fit the training, because it was changed.
    """
    try:
        _load_state_dict(trainer, _copied(snapshot))
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


def _load_state_dict(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore all values; the callback is first, because it gives parameters their shapes."""
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
        trainer.next_batch()  # the digest of the order covers all batches
    trainer.forward_passes = state["forward_passes"]
    trainer.guard.skipped = state["skipped"]
    for name in (*_COUNTERS, *_LISTS):
        setattr(trainer, name, state[name])
    set_global_state(state["random"])
    trainer.step_start = step_start_of(trainer)


def is_snapshot(value: Any) -> bool:
    """Return whether a value has the entries that are read before a training continues."""
    try:
        losses, tokens, reported = value["losses"], value["step_tokens"], value["reported"]
        validation = dict(value["validation"])
        numbers = [*losses, *tokens, *validation, *validation.values(), reported]
        known = 0 <= reported <= min(len(losses), len(tokens))
    except (KeyError, TypeError, ValueError):
        return False
    return known and all(isinstance(number, int | float) for number in numbers)


def steps_of(snapshot: TrainerState) -> int:
    """Return the number of optimiser steps taken in a snapshot."""
    return len(snapshot["losses"])


def _scaler(trainer: Trainer) -> Any:
    return trainer.runtime.accelerator.scaler


def _copied(value: Any) -> Any:
    """Copy tensors and containers, so that changes do not affect the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
