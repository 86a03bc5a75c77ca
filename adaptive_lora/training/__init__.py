"""Training: the loop over optimiser steps with validation, early stopping and the stability guard."""

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
