"""What a plan takes of memory, weights and optimiser: known before anything is loaded.

Activations are not counted: they depend on batch, length and checkpointing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive_lora.allocation import Plan
from adaptive_lora.models import count_parameters

if TYPE_CHECKING:
    from torch import nn

_TRAINED = 16
"""Bytes of a trained parameter: float32 weight, gradient and AdamW's two moments."""
_HALF = 2
"""Bytes of a weight in bfloat16 or float16."""
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share another, in bitsandbytes' 4-bit format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMemory:
    """Bytes that a training holds from start to end."""

    base: int
    """Frozen base in bfloat16, or in 4 bit where the plan says so (what stays, in bfloat16)."""
    trained: int
    """Trained parameters with gradients and moments, float32."""

    packed: bool
    """Whether the base is in 4 bit."""

    def __str__(self) -> str:
        """Return both and their sum in words."""
        kept = "4 bit and bf16" if self.packed else "bf16"
        return (
            f"{_size(self.base + self.trained)} without activations: base in {kept} "
            f"{_size(self.base)}, trained with gradients and moments {_size(self.trained)}"
        )


def plan_memory(model: nn.Module, plan: Plan) -> PlanMemory:
    """Return what training a plan takes; works on models without weights."""
    total = count_parameters(model)
    base = _HALF * total if plan.base == "full" else _nf4_bytes(model, total)
    trained = _TRAINED * plan.trainable_parameters
    return PlanMemory(base=base, trained=trained, packed=plan.base != "full")


def _nf4_bytes(model: nn.Module, total: int) -> int:
    """Return the bytes of a base whose linear maps, but the head, are in NF4, the rest in bf16.

    4 bits a weight, 8 bits a block for its scale, and a float32 for each 256 of those (QLoRA,
    2305.14314, section 3).
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    quantised = [
        int(module.get_parameter("weight").numel())
        for name, module in model.named_modules()
        if _is_linear(module) and should_convert_module(name, kept)
    ]
    blocks = [math.ceil(weights / _BLOCK) for weights in quantised]
    scales = sum(count + 4 * math.ceil(count / _NESTED_BLOCK) for count in blocks)
    packed = sum(math.ceil(weights / 2) for weights in quantised)
    return packed + scales + _HALF * (total - sum(quantised))


def _is_linear(module: nn.Module) -> bool:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Linear | Conv1D)


def _size(count: int) -> str:
    """Return bytes as GB, or MB where that is below one."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
