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
    from adaptive_lora.training.trainer import Course

Snapshot = Mapping[str, Any]
"""Tensors and plain values, in nested mappings, lists and tuples."""

_COUNTERS = ("tokens", "supervised", "seconds", "reported", "micro_batch")
_LISTS = ("losses", "validation", "step_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """What a step uses up before it changes any weight: where a step cut in two begins anew."""

    random: GlobalState
    batches_drawn: int
    forward_passes: int


def stand_of(course: Course) -> Stand:
    """Return where a course stands between two steps."""
    return Stand(random=global_state(), batches_drawn=course.batches_drawn, forward_passes=course.forward_passes)


def take(course: Course) -> Snapshot:
    """Return a copy of all that the next step depends on or that the result reports.

    Within a step, before its weights change, this is the end of the step before.
    """
    stand = course.stand
    state: Snapshot = _copied(
        {
            "weights": {n: p for n, p in course.model.named_parameters() if p.requires_grad},
            "optimizer": course.raw_optimizer.state_dict(),
            "scheduler": course.scheduler.state_dict(),
            "scaler": _scaler(course).state_dict() if _scaler(course) is not None else None,
            "regime": course.regime.state(),
            "early": course.early.state(),
            "random": stand.random,
            "batches_drawn": stand.batches_drawn,
            "forward_passes": stand.forward_passes,
            "skipped": course.guard.skipped,
            **{name: getattr(course, name) for name in (*_COUNTERS, *_LISTS)},
        }
    )
    return state


def put_back(course: Course, snapshot: Snapshot) -> None:
    """Bring a fresh course of the same training to where a snapshot was taken.

    Raises:
        AdapterError: the snapshot is of no such training, since somebody changed it.
    """
    try:
        _put_back(course, _copied(snapshot))
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


def _put_back(course: Course, state: dict[str, Any]) -> None:
    """Put back the parts; the regime goes first: it gives parameters the shapes of then."""
    course.regime.restore(state["regime"])
    weights = {n: p for n, p in course.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["weights"][name])
    course.raw_optimizer.load_state_dict(state["optimizer"])
    course.scheduler.load_state_dict(state["scheduler"])
    if _scaler(course) is not None:
        _scaler(course).load_state_dict(state["scaler"])
    course.early.restore(state["early"])
    if state["batches_drawn"] > course.steps * course.config.accumulation:
        raise ValueError(f"{state['batches_drawn']} batches of {course.steps} steps")
    while course.batches_drawn < state["batches_drawn"]:
        course.next_batch()  # the digest of the order is that of all batches
    course.forward_passes = state["forward_passes"]
    course.guard.skipped = state["skipped"]
    for name in (*_COUNTERS, *_LISTS):
        setattr(course, name, state[name])
    set_global_state(state["random"])
    course.stand = stand_of(course)


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


def steps_of(snapshot: Snapshot) -> int:
    """Return the optimiser steps that a snapshot holds."""
    return len(snapshot["losses"])


def _scaler(course: Course) -> Any:
    return course.runtime.accelerator.scaler


def _copied(value: Any) -> Any:
    """Copy tensors and containers, so that neither side changes the other."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
