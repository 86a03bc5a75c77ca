"""What a plan on a base loads memory with."""

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
    """Return what a training loads memory with.

    Families that give no ranks are counted as if every map had an adapter: their backward pass
    needs the maps' inputs too.

    Args:
        base: transformers model, its weights may be on the meta device.
        sites: of the base.
        plan: what is trained.
        precision: of the training.
        longest: tokens of the longest example.
        fused: the model runs by fused steps.
        packed: examples run as packed rows, whose loss is formed in chunks.
        head: modules of the base that the task trains beside the plan.
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
    """Return the parameters of the head that are not the plan's own."""
    own = {} if isinstance(plan, RankPlan) else plan.tensors
    return sum(
        int(tensor.numel())
        for module in head
        for name, tensor in base.get_submodule(module).named_parameters(prefix=module)
        if name not in own
    )
