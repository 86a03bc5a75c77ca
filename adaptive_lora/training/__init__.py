"""Training: the accelerate loop with validation, early stopping and the stability guard."""

from adaptive_lora.training.callback import NoCallback, TrainerCallback
from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
from adaptive_lora.training.guard import StabilityGuard
from adaptive_lora.training.trainer import Runner, StepEvent, TrainInputs, events_of, is_validated, total_steps, train

__all__ = [
    "Frequency",
    "NoCallback",
    "Runner",
    "StabilityGuard",
    "StepEvent",
    "TrainInputs",
    "TrainerCallback",
    "TrialCheckpoints",
    "events_of",
    "is_validated",
    "total_steps",
    "train",
]
