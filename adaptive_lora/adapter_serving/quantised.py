"""A base in 4 bit: how bitsandbytes makes it, the same in training and in serving.

QLoRA (Dettmers et al. 2023, 2305.14314): weights of linear maps are frozen in 4-bit NormalFloat,
their scales quantised once more (double quantisation), and every product is computed in the base's
type. Embeddings, norms, whatever stands on top of the base, and maps that transformers never
quantises stay as they are.
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


def quantised_settings(record: Mapping[str, Any], dtype: torch.dtype, model: Any) -> Any:
    """Return transformers' settings for a recorded quantisation.

    Args:
        record: such as `NF4`.
        dtype: in which products are computed.
        model: the architecture that is loaded, without weights.

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
        llm_int8_skip_modules=_kept(model),  # of 4 bit too, whatever its name says
    )


def packed_maps(model: Any) -> frozenset[str]:
    """Return the names of the linear maps that are in 4 bit, or would be if the model were."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = dict(model.named_modules())
    packed = {n for n, m in modules.items() if hasattr(getattr(m, "weight", None), "quant_state")}
    if packed:
        return frozenset(packed)
    kept = _kept(model)
    return frozenset(
        name
        for name, module in modules.items()
        if (isinstance(module, Conv1D) or type(module) is Linear)
        and should_convert_module(name, kept)
    )


def _kept(model: Any) -> list[str]:
    """Return the modules that stay as they are, as transformers takes them.

    Its own choice (tied weights, the output embeddings, what an architecture forbids: T5 casts what
    goes into `wo` to the type of its weight, which in 4 bit is uint8), and what a task may train:
    whatever stands on top of the base, and poolers.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    if not hasattr(model, "all_tied_weights_keys"):
        return []  # not made by transformers, which therefore never loads it
    prefix = model.base_model_prefix
    on_top = [n for n, _ in model.named_children() if n != prefix] if hasattr(model, prefix) else []
    poolers = [n for n, _ in model.named_modules() if n.rpartition(".")[2] == "pooler"]
    forbidden = model._keep_in_fp32_modules or ()
    return sorted({*get_keys_to_not_convert(model), *on_top, *poolers, *forbidden})


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
