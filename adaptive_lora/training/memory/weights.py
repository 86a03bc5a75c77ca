"""The bytes of a frozen base's weights, known before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptive_lora.models.base import count_parameters
from adaptive_lora.serving import packed_maps

if TYPE_CHECKING:
    from torch import nn

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share another, in bitsandbytes' 4-bit format."""


def weight_bytes(model: nn.Module, *, packed: bool, number_bytes: int) -> int:
    """Return the bytes of a base's weights; those of a skeleton are the ones it will have.

    Args:
        model: the base, or its architecture on the meta device.
        packed: it is kept in 4 bit, as far as it can be.
        number_bytes: of a weight that is not packed.
    """
    weights = list(model.parameters())
    if not any(weight.is_meta for weight in weights):
        return sum(weight.nbytes for weight in weights)
    total = count_parameters(model)
    return _nf4_bytes(model, total, number_bytes) if packed else number_bytes * total


def _nf4_bytes(model: nn.Module, total: int, number_bytes: int) -> int:
    """Return the bytes of a base whose linear maps are in NF4, as far as they can be.

    4 bits a weight, 8 bits a block for its scale, and a float32 for each 256 of those (QLoRA,
    2305.14314, section 3).
    """
    quantised = [int(model.get_submodule(name).get_parameter("weight").numel()) for name in sorted(packed_maps(model))]
    blocks = [math.ceil(weights / _BLOCK) for weights in quantised]
    scales = sum(count + 4 * math.ceil(count / _NESTED_BLOCK) for count in blocks)
    packed = sum(math.ceil(weights / 2) for weights in quantised)
    return packed + scales + number_bytes * (total - sum(quantised))
