"""Training: the accelerate loop with validation, early stopping and the stability guard."""

from adaptive_lora.training.guard import StabilityGuard
from adaptive_lora.training.loop import StepEvent, TrainInputs, train

__all__ = ["StabilityGuard", "StepEvent", "TrainInputs", "train"]
