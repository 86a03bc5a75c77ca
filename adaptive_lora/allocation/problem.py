"""One allocation problem, and the rounding of wanted ranks to integer ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptive_lora.allocation.budget import fit_to_budget
from adaptive_lora.allocation.certificate import Certificate
from adaptive_lora.allocation.request import ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationProblem:
    """Sites, rank limits, budget and profile of one allocation."""

    sites: tuple[AdapterSite, ...]
    """Sites sorted by layer, then name, so that ties do not depend on the caller's order."""
    lower: tuple[int, ...]
    """Minimum rank per site."""
    upper: tuple[int, ...]
    """Maximum rank per site."""
    multiple: int = 1
    """Step between allowed ranks: every rank is a multiple of it."""
    budget: int | None = None
    """Maximum number of parameters, or None where the user gives none."""
    profile: ProfileSummary | None = None
    seed: int = 0
    """Seed of the trial, for methods that draw at random."""

    @property
    def costs(self) -> list[int]:
        """Parameters per rank of each site."""
        return [site.parameters_per_rank for site in self.sites]

    def cost_of(self, ranks: Sequence[int]) -> int:
        """Return the parameters of these ranks."""
        return sum(cost * rank for cost, rank in zip(self.costs, ranks, strict=True))

    def fit(self, weights: Sequence[float], budget: int, bounds: tuple[float, float] | None = None) -> tuple[int, ...]:
        """Return ranks in proportion to weights that fill the budget.

        Args:
            weights: wanted share per site, non-negative.
            budget: maximum number of parameters.
            bounds: minimum and maximum rank as multiples of the rank that uniform would have; the
                problem's own limits take precedence, and so does a budget that they would make
                impossible.
        """
        lower, upper = list(self.lower), list(self.upper)
        if bounds is not None:
            uniform = budget / sum(cost / site.active for cost, site in zip(self.costs, self.sites, strict=True))
            least = [self._step_down(bounds[0] * uniform / site.active) for site in self.sites]
            most = [-self._step_down(-bounds[1] * uniform / site.active) for site in self.sites]
            inner = [min(max(low, limit), up) for low, limit, up in zip(lower, least, upper, strict=True)]
            outer = [min(max(low, limit), up) for low, limit, up in zip(inner, most, upper, strict=True)]
            lower = inner if self.cost_of(inner) <= budget else lower
            upper = outer if self.cost_of(outer) >= budget else upper
        return tuple(fit_to_budget(weights, self.costs, lower, upper, budget, self.multiple))

    def uniform(self, budget: int) -> tuple[int, ...]:
        """Return the ranks that uniform has under the same budget and limits."""
        return self.fit(self._shared((1.0,) * len(self.sites)), budget)

    def _shared(self, ranks: Sequence[float]) -> tuple[float, ...]:
        """Return ranks of linear layers as those of sites: experts divide them by the number of active ones."""
        return tuple(rank / site.active for rank, site in zip(ranks, self.sites, strict=True))

    def rounded(self, wanted: Sequence[float]) -> tuple[int, ...]:
        """Return wanted ranks rounded down into the limits, where there is no budget.

        Raises:
            AllocationError: a rank is above a site's smaller side and nothing caps it.
        """
        ranks = []
        for rank, site, low, up in zip(wanted, self.sites, self.lower, self.upper, strict=True):
            if rank > site.max_rank and up == self._step_down(site.max_rank):
                raise AllocationError(
                    f"{site.name} would get rank {math.floor(rank)}; required at most "
                    f"{site.max_rank} (the smaller side of {site.in_features} x "
                    f"{site.out_features}); lower the rank or set max_rank."
                )
            ranks.append(min(max(self._step_down(rank), low), up))
        return tuple(ranks)

    def granted(self, request: RankRequest) -> Solution:
        """Return the integer ranks of a request: under a budget its ranks are proportions, else they are rounded."""
        budget = request.budget if self.budget is None else self.budget
        wanted = self._shared(request.ranks)
        if budget is None:
            return Solution(ranks=self.rounded(wanted), budget=None)
        return Solution(ranks=self.fit(wanted, budget, request.bounds), budget=budget)

    def _step_down(self, rank: float) -> int:
        return math.floor(rank / self.multiple) * self.multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Integer ranks, with the certificate of the method that computed them."""

    ranks: tuple[int, ...]
    budget: int | None
    """Number of parameters to be spent, or None."""
    lr_multipliers: tuple[float, ...] | None = None
    """Factor of the learning rate per site; None: 1 everywhere."""
    certificate: Certificate | None = None


class RankSolver(Protocol):
    """The interface of a rank method that computes ranks."""

    @property
    def wrapped(self) -> RankSolver | None:
        """Method that a control arm wraps; None for other methods."""

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return integer ranks within a problem's limits and budget."""
