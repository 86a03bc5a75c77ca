"""The state of a training: everything needed to continue as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_lora.seeding import GlobalState

TrainerState = Mapping[str, Any]
"""Tensors and plain values, in nested mappings, lists and tuples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStart:
    """State that a step changes before any weight, from which an interrupted step is repeated."""

    random: GlobalState
    batches_drawn: int
    forward_passes: int


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


def copied(value: Any) -> Any:
    """Copy tensors and containers, so that changes do not affect the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value
