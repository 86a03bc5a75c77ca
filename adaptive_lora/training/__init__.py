"""Training: the loop over optimiser steps with validation, early stopping and the stability guard."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
    from adaptive_lora.training.inputs import StepEvent, TrainInputs, events_of, is_validated, total_steps
    from adaptive_lora.training.stopping import StabilityGuard
    from adaptive_lora.training.trainer import Trainer

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
    homes = {
        "Frequency": "checkpoint",
        "TrialCheckpoints": "checkpoint",
        "StabilityGuard": "stopping",
        "Trainer": "trainer",
    }
    return getattr(import_module(f"{__name__}.{homes.get(name, 'inputs')}"), name)
