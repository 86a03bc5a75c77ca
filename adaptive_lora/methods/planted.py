"""Ranks by the patterns that planted teachers have: the known answer of a planted study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import ATTENTION_ROLES, AdapterSite, Role
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option
from adaptive_lora.seeding import rng_for


def flat(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return equal weights: the case in which uniform is right."""
    return [1.0] * len(sites)


def one_family(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on attention alone."""
    return [float(site.role in ATTENTION_ROLES) for site in sites]


def two_families(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the projections that write into the residual stream alone."""
    return [float(site.role in _WRITING) for site in sites]


def early(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the first third of the blocks."""
    return [float(3 * block < blocks) for block, blocks in _blocks(sites)]


def late(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the last third of the blocks."""
    return [float(3 * block >= 2 * blocks) for block, blocks in _blocks(sites)]


def sparse(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on a random quarter of the sites."""
    chosen = set(rng.permutation(len(sites))[: max(1, len(sites) // 4)].tolist())
    return [float(index in chosen) for index in range(len(sites))]


def graded_depth(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weights that fall linearly from the first block to the last one, whose weight is 1."""
    return [float(blocks - block) for block, blocks in _blocks(sites)]


def graded_families(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight 4 on query, key and value, 2 on what writes into the residual stream, 1 elsewhere."""
    return [4.0 if site.role in _READING else 2.0 if site.role in _WRITING else 1.0 for site in sites]


def scattered(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return exponentially distributed weights: every site needs another rank."""
    return [float(weight) for weight in rng.exponential(size=len(sites))]


def _blocks(sites: Sequence[AdapterSite]) -> list[tuple[int, int]]:
    """Return the position of each site's block among the blocks with sites, and their number."""
    blocks = sorted({site.layer for site in sites})
    return [(blocks.index(site.layer), len(blocks)) for site in sites]


_WRITING = frozenset({Role.OUTPUT, Role.DOWN})
_READING = ATTENTION_ROLES - _WRITING
_OWN = (flat, one_family, two_families, early, late, sparse, graded_depth, graded_families)
PATTERNS: Mapping[str, Callable[[Sequence[AdapterSite], np.random.Generator], list[float]]] = MappingProxyType(
    {**{pattern.__name__: pattern for pattern in _OWN}, "random": scattered}
)
"""Name -> function that gives every site a weight, of which ranks are proportions."""


@dataclass(frozen=True, kw_only=True)
class Planted(RankMethod):
    """Ranks in proportion to a pattern's weights, by apportionment within the budget.

    A site without weight has `min_rank`, which is 0 unless it is given. A planted teacher has the ranks of this
    method, so that it is the oracle of a study of that teacher.
    """

    name: ClassVar[str] = "planted"
    least_rank: ClassVar[int | None] = 0
    pattern: str = option("sparse", "sites that get the ranks", limits=Limits(choices=tuple(PATTERNS)))
    draw: int = option(0, "seed of the sites of `sparse` and the weights of `random`", limits=Limits(low=0))
    rank: int = option(2, "rank of uniform at the same cost", limits=RANK)

    @property
    def rank_label(self) -> str:
        """Return `sparse-r2`, whatever the draw, so that studies of several teachers can be compared together."""
        return f"{self.pattern}-r{self.rank}"

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the pattern's weights and the cost of uniform."""
        weights = PATTERNS[self.pattern](sites, rng_for(self.draw, "planted", self.pattern))
        return RankRequest(ranks=tuple(weights), budget=self.rank * sum(site.parameters_per_rank for site in sites))

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the ranks; what is left of the budget goes to no site without weight whose minimum is 0.

        Raises:
            AllocationError: no site has weight, or those that have cannot take the budget.
        """
        wanted = self.demand(problem.sites, problem.profile)
        open_sites = [weight > 0 or low > 0 for weight, low in zip(wanted.ranks, problem.lower, strict=True)]
        if not any(wanted.ranks):
            raise AllocationError(f"planted: the base has no site of the pattern {self.pattern}; choose another one.")
        upper = tuple(most if is_open else 0 for most, is_open in zip(problem.upper, open_sites, strict=True))
        return dataclasses.replace(problem, upper=upper).granted(wanted)
