"""AdaLoRA: the least important singular triplets are pruned during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import DecidesInPhases, StartsAboveBudget
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class AdaLora(DecidesInPhases, StartsAboveBudget):
    """AdaLoRA (Zhang et al. 2023, 2303.10512) through PEFT, folded into plain LoRA at the end.

    Updates P·diag(E)·Q start at a higher rank. Every `interval` steps the triplets with the largest
    smoothed sensitivity times its uncertainty (section 3.2) are kept; their number falls by a cubic
    schedule (section 3.3). Departure: the schedule ends not at a fixed number of ranks but at as many
    of the best triplets as the parameter budget allows. alpha / rank stays that of the start, as in
    PEFT, and is folded in at the end.
    """

    name: ClassVar[str] = "adalora"
    start_factor: ClassVar[float] = 1.5  # as in the paper
    decisions: ClassVar[int] = 100
    scaling_in_training: ClassVar[str] = (
        "AdaLoRA keeps the factor of its start rank while ranks fall. P and Q start at random and "
        "E at zero, so its first update has another size than plain LoRA's: give it learning rates "
        "of its own. The final adapter has the policy's factor; the rest is folded into A."
    )
    refused_variants: ClassVar[Mapping[str, str]] = {
        **StartsAboveBudget.refused_variants,
        "dora": "PEFT's AdaLoRA has no magnitudes",
        "lora_plus": "LoRA+ is for a B that starts at zero, AdaLoRA trains P, E and Q",
    }
    orthogonality: float = option(
        0.5, "weight of the penalty that keeps P and Q orthogonal", limits=Limits(low=0), label="orth{:g}"
    )

    def start_plan(self, plan: RankPlan) -> RankPlan:
        """Return the starting plan: the same rank at every site, above the budget.

        Raises:
            AllocationError: the starting plan is not above the budget, or its rank does not fit every site.
        """
        start = super().start_plan(plan)
        ranks = {entry.rank for entry in start.entries}
        if len(ranks) > 1:
            raise AllocationError(
                f"adalora starts at one rank everywhere, but rank {max(ranks)} does not fit every "
                f"site (the smallest takes {min(ranks)}); lower rank or start_rank."
            )
        return start

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train AdaLoRA layers, then fold them into plain LoRA of mixed rank."""
        from adaptive_lora.methods.adalora.fit import fit_adalora

        return fit_adalora(self, trial)
