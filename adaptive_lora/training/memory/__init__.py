"""Estimates of the memory of a training, and the choice of batches that fit a limit."""

from adaptive_lora.training.memory.estimate import (
    Estimate,
    Load,
    MemoryChoice,
    activation_numbers,
    choose,
    describe,
    estimate,
    fit,
)
from adaptive_lora.training.memory.gpus import GPU_SIZES, MOST_GPUS, USABLE, GpuNeed, Storage, gpu_needs
from adaptive_lora.training.memory.load import load_of, storage_of

__all__ = [
    "GPU_SIZES",
    "MOST_GPUS",
    "USABLE",
    "Estimate",
    "GpuNeed",
    "Load",
    "MemoryChoice",
    "Storage",
    "activation_numbers",
    "choose",
    "describe",
    "estimate",
    "fit",
    "gpu_needs",
    "load_of",
    "storage_of",
]
