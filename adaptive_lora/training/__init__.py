"""Training: the loop over optimiser steps with validation, early stopping and the stability guard."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
    from adaptive_lora.training.stopping import StabilityGuard
    from adaptive_lora.training.trainer import StepEvent, Trainer, TrainInputs, events_of, is_validated, total_steps

__all__ = [
    "Frequency",
    "StabilityGuard",
    "StepEvent",
    "TrainInputs",
    "Trainer",
    "TrialCheckpoints",
    "events_of",
    "is_validated",
    "total_steps",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: `plan` needs the memory formula alone, and PEFT takes seconds to load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"Frequency": "checkpoint", "TrialCheckpoints": "checkpoint", "StabilityGuard": "stopping"}
    return getattr(import_module(f"{__name__}.{module.get(name, 'trainer')}"), name)
