"""Sizes of a plan on a base, for the memory estimate: also before its weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from adaptive_lora.allocation import Plan, RankPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config.types import Precision
from adaptive_lora.models.base import count_parameters
from adaptive_lora.serving import packed_layers
from adaptive_lora.training.memory.estimate import Load

_BLOCK, _NESTED_BLOCK = 64, 256
"""Number of weights per scale, and of scales per second-level scale, in bitsandbytes' 4-bit format."""


def load_of(
    base: Any,
    sites: Sequence[AdapterSite],
    plan: Plan,
    *,
    precision: Precision,
    longest: int,
    fused: bool = True,
    packed: bool = True,
    head: Sequence[str] = (),
) -> Load:
    """Return the sizes of a training that determine its memory.

    Tuners without ranks are counted as if every linear layer had an adapter: their backward pass
    needs the layers' inputs too.

    Args:
        base: transformers model; its weights may be on the meta device.
        sites: all sites of the base.
        plan: plan of the trained parameters.
        precision: of the training.
        longest: number of tokens of the longest example.
        fused: whether the model runs by fused kernels.
        packed: whether examples run as packed rows, whose loss is computed in chunks.
        head: modules of the base that the task trains in addition to the plan.
    """
    number_bytes = precision.number_bytes
    everywhere = {site.name: 1 for site in sites}
    outputs = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    text = None if outputs is None else base.config.get_text_config()
    return Load(
        sites=sites,
        ranks=plan.rank_pattern() if isinstance(plan, RankPlan) else everywhere,
        weights=weight_bytes(base, packed=plan.base != BaseStorage.FULL, number_bytes=number_bytes),
        trained_parameters=plan.trainable_parameters + _beside(base, plan, head),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        number_bytes=number_bytes,
        longest=longest,
        whole_logits=not packed,
        spelled_activation=not fused and any(type(module).__name__ == "NewGELUActivation" for module in base.modules()),
    )


def _beside(base: Any, plan: Plan, head: Sequence[str]) -> int:
    """Return the number of parameters of the head that are not in the plan."""
    own = {} if isinstance(plan, RankPlan) else plan.tensors
    return sum(
        int(tensor.numel())
        for module in head
        for name, tensor in base.get_submodule(module).named_parameters(prefix=module)
        if name not in own
    )


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
