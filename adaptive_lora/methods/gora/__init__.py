"""GoRA: ranks by importance, B from the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK
from adaptive_lora.methods.base import RankMethod, TrainedTrial, TrialContext
from adaptive_lora.methods.initialised import INIT, RANKS, check_choices, label_of
from adaptive_lora.methods.measured import per_parameter
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class Gora(RankMethod):
    """GoRA (He et al. 2025, 2502.12171): ranks by mean |w·g|, B from the compressed gradient.

    Rank of a site: round(share of importance x sum of sqrt(m + n)·rank / sqrt(m + n)), clipped to
    half and four times `rank` (section 3.2); without a budget, this gives any number of parameters.
    With one, the same shares fill it within these limits. B is initialised so that B·A is the
    gradient's projection on A, with the norm of one SGD step at rate gamma (section 3.3). The
    paper's scaling is `rslora`. Departure: the gradient is that of the calibration batches, weighted
    by token.
    """

    name: ClassVar[str] = "gora"
    scaling_in_training: ClassVar[str] = (
        "The factor is the policy's at each rank (the paper's is scaling=rslora). B starts from "
        "the gradient divided by the factor, so that the first function does not depend on it."
    )
    rank: int = option(16, "reference rank, close to the mean over sites", limits=RANK)
    gamma: float = option(0.05, "learning rate of the SGD step that initialises B", limits=Limits(above=0))
    ranks: str = option("own", "'own': by mean |w·g|; 'uniform': equal", limits=RANKS)
    init: str = option("own", "'own': B from the gradient; 'default': zero", limits=INIT)

    def __post_init__(self) -> None:
        """Refuse options that make another method."""
        check_choices("gora", self.ranks, self.init)

    @property
    def metric(self) -> str | None:
        """Name of the importance profile for its ranks."""
        return "weight_gradient" if self.ranks == "own" else None

    @property
    def is_plain_lora(self) -> bool:
        """Mark of the variant that uses its ranks alone, with the default initialisation."""
        return self.init == "default"

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        gamma = "" if self.gamma == 0.05 else f"-gamma{self.gamma:g}"
        return label_of(self.rank, self.ranks, self.init) + gamma

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the paper's ranks, or the same shares under a budget."""
        if self.ranks == "uniform":
            weights = [1.0] * len(problem.sites)
        else:
            weights = [
                value * math.sqrt(site.parameters_per_rank)
                for value, site in zip(
                    per_parameter("gora", problem.sites, problem.profile), problem.sites, strict=True
                )
            ]  # importance / sqrt(m + n)
        if problem.budget is not None:
            ranks = problem.fit(weights, problem.budget, (0.5, 4.0))
            return Solution(ranks=ranks, budget=problem.budget)
        if self.ranks == "uniform":
            return Solution(ranks=problem.rounded([self.rank] * len(weights)), budget=None)
        roots = [math.sqrt(site.parameters_per_rank) for site in problem.sites]
        importance = sum(weight * root for weight, root in zip(weights, roots, strict=True))
        wanted = [math.floor(sum(roots) * self.rank * weight / importance + 0.5) for weight in weights]
        low, high = max(1, self.rank // 2), 4 * self.rank
        clipped = [min(max(rank, low), high, site.max_rank) for rank, site in zip(wanted, problem.sites, strict=True)]
        return Solution(ranks=problem.rounded(clipped), budget=None)

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Initialise every B from its site's gradient, unless only the ranks are used, and train."""
        if self.is_plain_lora:
            return super().fit(trial)
        from adaptive_lora.methods.gora.fit import fit_gora

        return fit_gora(self, trial)
