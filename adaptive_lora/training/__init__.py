"""Training: the accelerate loop with validation, early stopping and the stability guard."""

from adaptive_lora.training.callback import Regime, Steady
from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
from adaptive_lora.training.guard import StabilityGuard
from adaptive_lora.training.trainer import Runner, StepEvent, TrainInputs, events_of, is_validated, total_steps, train

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
