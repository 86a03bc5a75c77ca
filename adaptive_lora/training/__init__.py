"""Training: the accelerate loop with validation, early stopping and the stability guard."""

from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
from adaptive_lora.training.guard import StabilityGuard
from adaptive_lora.training.loop import (
    Runner,
    StepEvent,
    TrainInputs,
    events_of,
    is_validated,
    total_steps,
    train,
)
from adaptive_lora.training.regime import Regime, Steady

__all__ = [
    "Frequency",
    "Regime",
    "Runner",
    "StabilityGuard",
    "Steady",
    "StepEvent",
    "TrainInputs",
    "TrialCheckpoints",
    "events_of",
    "is_validated",
    "total_steps",
    "train",
]
