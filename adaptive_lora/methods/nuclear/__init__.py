"""Ranks from trainings under a nuclear-norm penalty, and their retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import StartsAboveBudget
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class NuclearRetrain(StartsAboveBudget):
    """Train above the budget under a nuclear-norm penalty, cut to the budget, and retrain.

    The penalty is λ times the sum over sites of p·||ΔW||*, trained as p·s·(||A||² + ||B||²)/2 with LoRA's factor s,
    which has the same minimum (Recht, Fazel & Parrilo 2010, 0706.4138, lemma 5.1). The nuclear norm as a source of
    ranks is that of DiRA (OpenReview MlQ0goJG9U). Sites compete for the same part of the loss: what one has learned
    another need not, which no profile of the base can tell. In the first round the price p is a site's parameters per
    rank; in each further one it is also divided by the nuclear norm that the site had (the reweighted l1 norm of
    Candès, Wakin & Boyd 2008, 0711.1612), so that sites of little use are given up. After each round the singular
    values of all updates are pooled, the largest within the budget give ranks, and these are trained from scratch.
    Uniform ranks are trained too; those with the lowest validation loss are kept.
    """

    name: ClassVar[str] = "nuclear_retrain"
    start_factor: ClassVar[float] = 4.0
    scaling_in_training: ClassVar[str] = (
        "The searches train at the policy's factor of the start rank, the other trainings at that of the final ranks."
    )
    penalty: float = option(
        0.003,
        "λ as a share of the median over sites of the largest singular value of the base's gradient",
        limits=Limits(above=0),
        label="penalty{:g}",
    )
    rounds: int = option(
        2, "trainings under the penalty, each followed by one of its ranks", limits=Limits(low=1), label="rounds{}"
    )

    @property
    def trainings(self) -> int:  # type: ignore[override]
        """Number of full trainings: uniform ranks, and two in each round."""
        return 1 + 2 * self.rounds

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train uniform ranks and those of every round, and keep the best on validation data."""
        from adaptive_lora.methods.nuclear.fit import fit_nuclear_retrain

        return fit_nuclear_retrain(self, trial)
