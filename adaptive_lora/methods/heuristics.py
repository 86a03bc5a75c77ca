"""Methods without data: uniform ranks, the patterns of the reference study, and one rank per family of sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.budget import check_budget, fit_to_budget
from adaptive_lora.allocation.knapsack import Ints
from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import ATTENTION_ROLES, AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option


def _position(site: AdapterSite, sites: Sequence[AdapterSite]) -> float:
    """Return i/(L-1) in the site's tower: 0 for its first block with a site, 1 for its last.

    Encoder and decoder, or vision and language model, are separate towers.
    """
    layers = [other.layer for other in sites if other.tower == site.tower]
    first, last = min(layers), max(layers)
    return (site.layer - first) / (last - first) if last > first else 0.0


@dataclass(frozen=True, kw_only=True)
class Uniform(RankMethod):
    """Equal rank at every site, as in the original LoRA (Hu et al. 2021, 2106.09685)."""

    name: ClassVar[str] = "uniform"
    rank: int = option(16, "rank of every site", limits=RANK)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the same rank for every site."""
        return RankRequest(ranks=(float(self.rank),) * len(sites))


@dataclass(frozen=True, kw_only=True)
class LinearDecay(RankMethod):
    """Rank falls (or rises) linearly with depth, rounded down in each layer.

    rank(i) = high - (high - low)·i/(L-1) for `down`, mirrored for `up`. The published study
    describes 16 to 4; with every layer rounded down that is 3,751,936 parameters on
    DialoGPT-medium.
    """

    name: ClassVar[str] = "linear_decay"
    rank: int = option(16, "rank at the high end", limits=RANK)
    low_rank: int = option(4, "rank at the low end", limits=RANK)
    direction: str = option(
        "down", "'down': high at the input, low at the output; 'up': the reverse", limits=Limits(choices=("down", "up"))
    )

    @property
    def rank_label(self) -> str:
        """Return `r16-4`, or `r4-16` for the rising direction."""
        ends = (self.rank, self.low_rank)
        return "r{}-{}".format(*(ends if self.direction == "down" else ends[::-1]))

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the linear ramp over the layers."""
        if self.low_rank > self.rank:
            raise AllocationError(
                f"linear_decay needs low_rank <= rank; got low_rank={self.low_rank}, "
                f"rank={self.rank}; use direction=up for ranks that rise with depth."
            )
        return RankRequest(ranks=tuple(self._at(_position(site, sites)) for site in sites))

    def _at(self, position: float) -> float:
        if self.direction == "up":
            position = 1.0 - position
        # The ramp has integer ranks at some layers, which rounding errors must not lower by one.
        return round(self.rank - (self.rank - self.low_rank) * position, 9)


@dataclass(frozen=True, kw_only=True)
class AttentionHeavy(RankMethod):
    """Rank `rank` at attention sites and `feed_forward_rank` (half of it by default) at all others."""

    name: ClassVar[str] = "attention_heavy"
    rank: int = option(16, "rank of attention sites", limits=RANK)
    feed_forward_rank: int | None = option(None, "rank of feed-forward sites; none: half of rank", limits=RANK)

    @property
    def rank_label(self) -> str:
        """Return `r16-8`: attention, then feed-forward."""
        return f"r{self.rank}-{self._feed_forward}"

    @property
    def _feed_forward(self) -> int:
        return self.feed_forward_rank or max(1, self.rank // 2)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the two ranks."""
        return RankRequest(
            ranks=tuple(float(self.rank if site.role in ATTENTION_ROLES else self._feed_forward) for site in sites)
        )


@dataclass(frozen=True, kw_only=True)
class ThreeBand(RankMethod):
    """Ranks by thirds of the depth: x0.6, x1.2, x1.0.

    The published study called this pattern "empirical" although it uses no data; band edges are at
    i/(L-1) = 0.3 and 0.7.
    """

    name: ClassVar[str] = "three_band"
    rank: int = option(16, "base rank, multiplied per band and rounded down", limits=RANK)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the three ranks."""
        return RankRequest(ranks=tuple(self._at(_position(site, sites)) for site in sites))

    def _at(self, position: float) -> float:
        factor = 0.6 if position < 0.3 else 1.2 if position < 0.7 else 1.0
        return max(1.0, self.rank * factor)


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
