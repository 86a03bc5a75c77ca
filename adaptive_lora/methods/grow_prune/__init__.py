"""Grow and prune: ranks move between sites during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.phases import INTERVAL, SHARE, Phases, RanksInTraining, label_of
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class GrowPrune(RanksInTraining):
    """Grow and prune within a fixed budget: a method of this project, based on ElaLoRA and L1RA.

    Plain LoRA from equal ranks. Every `interval` steps the components with the lowest smoothed
    sensitivity |w·g| (AdaLoRA, 2303.10512, section 3.2, without the uncertainty) are replaced by new
    ones at the sites whose weakest component has the highest sensitivity. Departures: ElaLoRA
    (2504.00254) and L1RA (2509.04884) keep the number of ranks, this keeps the number of parameters,
    at every step; L1RA restarts the optimiser, here remaining components keep their moments; new
    components start with B = 0 and the next rows of the site's own stream in A, so the function does
    not change.
    """

    name: ClassVar[str] = "grow_prune"
    holds_limits: ClassVar[bool] = False
    scaling_in_training: ClassVar[str] = (
        "Where a rank is added or dropped, B is rescaled so that the function stays as it is; the "
        "factor, and so the size of the next steps, is the policy's at the new rank."
    )
    warmup_share: float = option(0.1, "share of the steps before the first move", limits=SHARE)
    final_share: float = option(0.4, "share of the steps after the last move", limits=SHARE)
    interval: int | None = option(None, INTERVAL.format("twentieth"), unit="steps", limits=Limits(low=1))
    move_share: float = option(
        0.1, "maximum number of new ranks per decision, as a share of all ranks", limits=Limits(above=0, high=1)
    )

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        return label_of(self, "rank", warmup_share="warm", final_share="final", interval="every",
                      move_share="move")  # fmt: skip

    def phases(self, steps: int) -> Phases:
        """Return the phases of rank changes in a training of `steps` steps."""
        return Phases.of(
            steps,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
            interval=self.interval or max(1, steps // 20),
        )

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train plain LoRA from equal ranks, moving ranks between sites."""
        from adaptive_lora.methods.grow_prune.fit import fit_grow_prune

        return fit_grow_prune(self, trial)
