"""Where a training stands: enough to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from adaptive_lora.training.loop import Course

Snapshot = Mapping[str, Any]
"""Tensors and plain values, in nested mappings and lists."""

_COUNTERS = ("tokens", "supervised", "seconds", "micro_batch")
_LISTS = ("losses", "validation", "step_tokens")


def take(course: Course) -> Snapshot:
    """Return a copy of all that the next step depends on or that the result reports."""
    state: Snapshot = _copied(
        {
            "weights": {n: p for n, p in course.model.named_parameters() if p.requires_grad},
            "optimizer": course.raw_optimizer.state_dict(),
            "scheduler": course.scheduler.state_dict(),
            "scaler": _scaler(course).state_dict() if _scaler(course) is not None else None,
            "regime": course.regime.state(),
            "early": course.early.state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "forward_passes": course.forward_passes,
            "skipped": course.guard.skipped,
            **{name: getattr(course, name) for name in (*_COUNTERS, *_LISTS)},
        }
    )
    return state


def put_back(course: Course, snapshot: Snapshot) -> None:
    """Bring a fresh course of the same training to where a snapshot was taken.

    The regime goes first: it gives parameters the shapes of then.
    """
    state = _copied(snapshot)
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
    while course.forward_passes < state["forward_passes"]:
        course.next_batch()
        course.forward_passes += 1
    course.guard.skipped = state["skipped"]
    for name in (*_COUNTERS, *_LISTS):
        setattr(course, name, state[name])
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])


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
