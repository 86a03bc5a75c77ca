"""The size of a frozen base's weights in bytes, before they are loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adaptive_lora.models.base import count_parameters
from adaptive_lora.serving import packed_layers

if TYPE_CHECKING:
    from torch import nn

_BLOCK, _NESTED_BLOCK = 64, 256
"""Number of weights per scale, and of scales per second-level scale, in bitsandbytes' 4-bit format."""


def weight_bytes(model: nn.Module, *, packed: bool, number_bytes: int) -> int:
    """Return the bytes of a base's weights, also for a model on the meta device.

    Args:
        model: the base, or its architecture on the meta device.
        packed: whether it is stored in 4 bit, where its layers allow it.
        number_bytes: bytes of a weight that is not packed.
    """
    weights = list(model.parameters())
    if not any(weight.is_meta for weight in weights):
        return sum(weight.nbytes for weight in weights)
    total = count_parameters(model)
    return _nf4_bytes(model, total, number_bytes) if packed else number_bytes * total


def _nf4_bytes(model: nn.Module, total: int, number_bytes: int) -> int:
    """Return the bytes of a base whose linear layers are in NF4, where they allow it.

    4 bits per weight, 8 bits per block for its scale, and a float32 for every 256 scales (QLoRA,
    2305.14314, section 3).
    """
    quantised = [
        int(model.get_submodule(name).get_parameter("weight").numel()) for name in sorted(packed_layers(model))
    ]
    blocks = [math.ceil(weights / _BLOCK) for weights in quantised]
    scales = sum(count + 4 * math.ceil(count / _NESTED_BLOCK) for count in blocks)
    packed = sum(math.ceil(weights / 2) for weights in quantised)
    return packed + scales + number_bytes * (total - sum(quantised))
