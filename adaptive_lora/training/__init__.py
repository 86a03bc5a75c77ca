"""Training: the loop over optimiser steps with validation, early stopping and the stability guard."""

from adaptive_lora.training.checkpoint import Frequency, TrialCheckpoints
from adaptive_lora.training.stopping import StabilityGuard
from adaptive_lora.training.trainer import StepEvent, TrainInputs, events_of, is_validated, total_steps, train

__all__ = [
    "Frequency",
    "StabilityGuard",
    "StepEvent",
    "TrainInputs",
    "TrialCheckpoints",
    "events_of",
    "is_validated",
    "total_steps",
    "train",
]
