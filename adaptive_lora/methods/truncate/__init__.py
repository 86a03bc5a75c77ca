"""Ranks from a trained adapter: train above the budget, then truncate to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import StartsAboveBudget


@dataclass(frozen=True, kw_only=True)
class Truncate(StartsAboveBudget):
    """Train every site at a higher rank, then keep the largest singular values of all updates.

    PARA (2604.27796): the singular values of every B·A are pooled and one global threshold decides,
    without retraining. By Eckart-Young, the truncation changes the updates least in Frobenius norm
    among all that keep as many components; a site may lose all of them. Training costs the parameters
    of the higher rank.
    """

    name: ClassVar[str] = "truncate"
    start_factor: ClassVar[float] = 2.0
    scaling_in_training: ClassVar[str] = (
        "Trained at the policy's factor of the start rank. The cut adapter has the factor of its "
        "final ranks, folded so that the function changes by the cut alone."
    )

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train above the budget, and truncate the trained updates to it."""
        from adaptive_lora.methods.truncate.fit import fit_truncate

        return fit_truncate(self, trial)


@dataclass(frozen=True, kw_only=True)
class TruncateRetrain(Truncate):
    """The final ranks of `truncate`, trained from scratch.

    The same seed gives each site's A the same initial rows. The comparison with `truncate` shows
    whether the ranks or the truncated weights matter. Trains twice.
    """

    name: ClassVar[str] = "truncate_retrain"
    scaling_in_training: ClassVar[str] = (
        "The search trains at the policy's factor of the start rank, the second training at that of the final ranks."
    )
    trainings: ClassVar[int] = 2

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train above the budget to find the ranks, then train these from the seed's initial weights."""
        from adaptive_lora.methods.truncate.fit import fit_truncate_retrain

        return fit_truncate_retrain(self, trial)
