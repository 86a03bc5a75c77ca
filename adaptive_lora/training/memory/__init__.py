"""Estimates of the memory of a training, and the choice of batches that fit a limit."""

from adaptive_lora.training.memory.estimate import (
    Estimate,
    Load,
    MemoryChoice,
    activation_numbers,
    choose,
    describe,
    estimate,
)
from adaptive_lora.training.memory.load import load_of

__all__ = ["Estimate", "Load", "MemoryChoice", "activation_numbers", "choose", "describe", "estimate", "load_of"]
