"""One rank for attention and one for all other sites: a control for the split between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.budget import check_budget, fit_to_budget
from adaptive_lora.allocation.knapsack import Ints
from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK
from adaptive_lora.allocation.site import ATTENTION_ROLES
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class FamilyUniform(RankMethod):
    """One rank for attention and another for all other sites, at a given ratio and uniform's budget.

    A control for methods whose effect may come from the split between attention and other sites
    alone. Of the maximal pairs of integer ranks within the budget, the pair nearest to the ratio is
    taken; single sites then get one more step while the remaining budget allows it.
    """

    name: ClassVar[str] = "family_uniform"
    ratio: float = option(2.0, "ratio of attention rank to feed-forward rank", limits=Limits(above=0))
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)

    @property
    def rank_label(self) -> str:
        """Return `r16-2to1`."""
        return f"r{self.rank}-{self.ratio:g}to1"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the two ranks, with the remaining budget spent on single sites."""
        budget = uniform_cost(problem.sites, self.rank) if problem.budget is None else problem.budget
        check_budget(problem.costs, problem.lower, problem.upper, budget)
        attention = [site.role in ATTENTION_ROLES for site in problem.sites]
        if len(set(attention)) == 1:
            return Solution(ranks=problem.uniform(budget), budget=budget)
        levels = self._levels(problem, attention, budget)
        ranks = [
            min(max(levels[family], low), up)
            for family, low, up in zip(attention, problem.lower, problem.upper, strict=True)
        ]
        weights = [self.ratio if family else 1.0 for family in attention]
        filled = fit_to_budget(weights, problem.costs, ranks, problem.upper, budget, problem.multiple)
        return Solution(ranks=tuple(filled), budget=budget)

    def _levels(self, problem: AllocationProblem, attention: list[bool], budget: int) -> dict[bool, int]:
        """Return the rank of attention (True) and of the others (False)."""
        lower, upper, costs = map(np.asarray, (problem.lower, problem.upper, problem.costs))

        def cost(inside: Ints) -> tuple[Ints, Ints]:
            ranks_R = np.arange(lower.min(), upper[inside].max() + 1, problem.multiple)
            each_RS = np.clip(ranks_R[:, None], lower[inside], upper[inside]) * costs[inside]
            return ranks_R, each_RS.sum(axis=1)

        (first_R, cost_R), (ranks_R, others_R) = (
            cost(np.flatnonzero(np.equal(attention, family))) for family in (True, False)
        )
        best_R = np.searchsorted(cost_R, budget - others_R, side="right") - 1
        pairs = [
            (int(first_R[best]), int(rank))
            for rank, best, following in zip(ranks_R, best_R, [*best_R[1:], -1], strict=True)
            if best >= 0 and following < best  # else the others could have a higher rank at the same attention rank
        ]
        wanted = math.log(self.ratio)
        first, second = min(pairs, key=lambda pair: abs(_log_ratio(*pair) - wanted))
        return {True: first, False: second}


def _log_ratio(attention: int, others: int) -> float:
    """Return log(attention / others), with 0 replaced by 0.5."""
    return math.log(max(attention, 0.5) / max(others, 0.5))
