"""GoRA: ranks by importance, B from the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK, RankRequest
from adaptive_lora.methods.base import TrialContext
from adaptive_lora.methods.initialised import Initialised
from adaptive_lora.methods.measured import per_parameter
from adaptive_lora.options import Limits, option

if TYPE_CHECKING:
    import torch

_BOUNDS = (0.5, 4.0)
"""Minimum and maximum rank of a site under a budget, as multiples of uniform's."""


@dataclass(frozen=True, kw_only=True)
class Gora(Initialised):
    """GoRA (He et al. 2025, 2502.12171): ranks by mean |w·g|, B from the compressed gradient.

    Rank of a site: round(share of importance x sum of sqrt(m + n)·rank / sqrt(m + n)), clipped to
    half and four times `rank` (section 3.2); without a budget, this gives any number of parameters.
    With one, the same shares fill it within these limits. B is initialised so that B·A is the
    gradient's projection on A, with the norm of one SGD step at rate gamma (section 3.3). The
    paper's scaling is `rslora`. Departure: the gradient is that of the calibration batches, weighted
    by token.
    """

    name: ClassVar[str] = "gora"
    side: ClassVar[str] = "lora_B"
    scaling_in_training: ClassVar[str] = (
        "The factor is the policy's at each rank (the paper's is scaling=rslora). B starts from "
        "the gradient divided by the factor, so that the first function does not depend on it."
    )
    rank: int = option(16, "reference rank, close to the mean over sites", limits=RANK)
    gamma: float = option(
        0.05, "learning rate of the SGD step that initialises B", limits=Limits(above=0), label="gamma{:g}"
    )

    @property
    def metric(self) -> str | None:
        """Name of the importance profile for its ranks."""
        return "weight_gradient" if self.ranks == "own" else None

    @property
    def is_plain_lora(self) -> bool:
        """Mark of the variant that uses its ranks alone, with the default initialisation."""
        return self.init == "default"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the paper's ranks, or the same shares under a budget."""
        sites = problem.sites
        if self.ranks == "uniform":
            return problem.granted(RankRequest(ranks=(float(self.rank),) * len(sites), bounds=_BOUNDS))
        roots = [math.sqrt(site.parameters_per_rank) for site in sites]
        values = per_parameter("gora", sites, problem.profile)
        weights = [value * root for value, root in zip(values, roots, strict=True)]  # importance / sqrt(m + n)
        if problem.budget is not None:
            return problem.granted(RankRequest(ranks=tuple(weights), bounds=_BOUNDS))
        importance = sum(weight * root for weight, root in zip(weights, roots, strict=True))
        wanted = [math.floor(sum(roots) * self.rank * weight / importance + 0.5) for weight in weights]
        low, high = max(1, self.rank // 2), 4 * self.rank
        clipped = [min(max(rank, low), high, site.max_rank) for rank, site in zip(wanted, sites, strict=True)]
        return Solution(ranks=problem.rounded(clipped), budget=None)

    def start_from(self, trial: TrialContext) -> tuple[RankPlan, Mapping[str, torch.Tensor]]:
        """Return the plan, and every B from its site's gradient."""
        from adaptive_lora.methods.gora.fit import initial_b

        return trial.plan, initial_b(trial, trial.plan, self.gamma)
