"""Grow and prune: ranks move between sites during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import DecidesInPhases
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class GrowPrune(DecidesInPhases):
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
    decisions: ClassVar[int] = 20
    scaling_in_training: ClassVar[str] = (
        "Where a rank is added or dropped, B is rescaled so that the function stays as it is; the "
        "factor, and so the size of the next steps, is the policy's at the new rank."
    )
    move_share: float = option(
        0.1,
        "maximum number of new ranks per decision, as a share of all ranks",
        limits=Limits(above=0, high=1),
        label="move{:g}",
    )

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train plain LoRA from equal ranks, moving ranks between sites."""
        from adaptive_lora.methods.grow_prune.fit import fit_grow_prune

        return fit_grow_prune(self, trial)
