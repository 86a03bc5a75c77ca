"""A base in 4 bit: how bitsandbytes makes it, the same in training and in serving.

QLoRA (Dettmers et al. 2023, 2305.14314): weights of linear maps are frozen in 4-bit NormalFloat,
their scales quantised once more (double quantisation), and every product is computed in the base's
type. Embeddings, norms and the output head stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NF4: Mapping[str, Any] = MappingProxyType({"scheme": "nf4", "double": True})
"""What an adapter's record says of a quantised base."""


def quantised_settings(record: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return transformers' settings for a recorded quantisation.

    Args:
        record: such as `NF4`.
        dtype: in which products are computed.

    Raises:
        ImportError: bitsandbytes is missing or does not load.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it misses a kernel that `settle` rules out anyway
    try:
        import bitsandbytes  # noqa: F401 - transformers asks for it later, with another error
    finally:
        log.setLevel(level)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=record["scheme"],
        bnb_4bit_use_double_quant=record["double"],
        bnb_4bit_compute_dtype=dtype,
    )


_BLOCK = 64
"""Weights that share a scale."""


def settle(model: Any) -> None:
    """Let a quantised model compute what its weights stand for, in training as in evaluation.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 packs the weights anew in evaluation, for a
    bfloat16 kernel that it would fetch from the hub. On any CPU it reads the scales row by row: a
    width that is no multiple of the block gives other weights (relative error 0.24 to 0.40 where
    NF4's is 0.09).

    Raises:
        ValueError: a map on a CPU has such a width.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % _BLOCK and module.weight.device.type == "cpu":
                raise ValueError(
                    f"{name} takes {module.in_features} inputs: in 4 bit on a CPU required a "
                    f"multiple of {_BLOCK}, because bitsandbytes decodes others wrongly there"
                )
