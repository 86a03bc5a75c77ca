"""Sizes of a plan on a base, for the memory estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptive_lora.allocation import Plan, RankPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config.precision import Precision
from adaptive_lora.training.memory.estimate import Load
from adaptive_lora.training.memory.weights import weight_bytes


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
    text = base.config.get_text_config() if base.get_output_embeddings() is not None else None
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
