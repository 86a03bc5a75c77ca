"""AdaLoRA: the least important singular triplets are pruned during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.allocation.request import RANK
from adaptive_lora.allocation.revised import equal_rank, start_rank
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.phases import INTERVAL, SHARE, Phases, RanksInTraining, label_of
from adaptive_lora.options import Limits, option

_START_FACTOR = 1.5
"""Ratio of AdaLoRA's starting rank to the uniform rank of the budget, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class AdaLora(RanksInTraining):
    """AdaLoRA (Zhang et al. 2023, 2303.10512) through PEFT, folded into plain LoRA at the end.

    Updates P·diag(E)·Q start at a higher rank. Every `interval` steps the triplets with the largest
    smoothed sensitivity times its uncertainty (section 3.2) are kept; their number falls by a cubic
    schedule (section 3.3). Departure: the schedule ends not at a fixed number of ranks but at as many
    of the best triplets as the parameter budget allows. alpha / rank stays that of the start, as in
    PEFT, and is folded in at the end.
    """

    name: ClassVar[str] = "adalora"
    holds_limits: ClassVar[bool] = False
    scaling_in_training: ClassVar[str] = (
        "AdaLoRA keeps the factor of its start rank while ranks fall. P and Q start at random and "
        "E at zero, so its first update has another size than plain LoRA's: give it learning rates "
        "of its own. The final adapter has the policy's factor; the rest is folded into A."
    )
    refused_variants: ClassVar[Mapping[str, str]] = {
        "dora": "PEFT's AdaLoRA has no magnitudes",
        "lora_plus": "LoRA+ is for a B that starts at zero, AdaLoRA trains P, E and Q",
    }
    start_rank: int | None = option(
        None, "rank of every site at the start; none: 1.5 times the uniform rank of the budget", limits=RANK
    )
    warmup_share: float = option(0.1, "share of the steps before the first pruning", limits=SHARE)
    final_share: float = option(0.4, "share of the steps after the last pruning", limits=SHARE)
    interval: int | None = option(None, INTERVAL.format("hundredth"), unit="steps", limits=Limits(low=1))
    orthogonality: float = option(0.5, "weight of the penalty that keeps P and Q orthogonal", limits=Limits(low=0))

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        return label_of(self, "rank", start_rank="from", warmup_share="warm", final_share="final",
                      interval="every", orthogonality="orth")  # fmt: skip

    def phases(self, steps: int) -> Phases:
        """Return the phases of rank changes in a training of `steps` steps."""
        return Phases.of(
            steps,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
            interval=self.interval or max(1, steps // 100),
        )

    def start_plan(self, plan: RankPlan) -> RankPlan:
        """Return the starting plan: the same rank at every site, above the budget.

        Raises:
            AllocationError: the starting plan is not above the budget, or its rank does not fit every site.
        """
        start = equal_rank(plan, start_rank(plan, self.start_rank, _START_FACTOR))
        ranks = {entry.rank for entry in start.entries}
        if len(ranks) > 1:
            raise AllocationError(
                f"adalora starts at one rank everywhere, but rank {max(ranks)} does not fit every "
                f"site (the smallest takes {min(ranks)}); lower rank or start_rank."
            )
        return start

    def check(self, plan: RankPlan) -> None:
        """Check the starting plan."""
        self.start_plan(plan)

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train AdaLoRA layers, then fold them into plain LoRA of mixed rank."""
        from adaptive_lora.methods.adalora.fit import fit_adalora

        return fit_adalora(self, trial)
