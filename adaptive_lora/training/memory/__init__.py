"""How much memory a training takes, by a formula, and what fits into a limit."""

from adaptive_lora.training.memory.choice import MemoryChoice, choose, describe
from adaptive_lora.training.memory.estimate import Estimate, Load, activation_numbers, estimate
from adaptive_lora.training.memory.load import load_of

__all__ = ["Estimate", "Load", "MemoryChoice", "activation_numbers", "choose", "describe", "estimate", "load_of"]
