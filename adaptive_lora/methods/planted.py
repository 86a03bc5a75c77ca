"""Ranks by the patterns that planted teachers have: the known answer of a planted study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import ATTENTION_ROLES, AdapterSite
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option
from adaptive_lora.seeding import rng_for


def flat(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return equal weights: the case in which uniform is right."""
    return [1.0] * len(sites)


def one_family(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on attention alone."""
    return [float(site.role in ATTENTION_ROLES) for site in sites]


def early(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the first third of the blocks."""
    return [float(place < 1 / 3) for place in _places(sites)]


def late(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on the last third of the blocks."""
    return [float(place >= 2 / 3) for place in _places(sites)]


def sparse(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return weight on a random quarter of the sites."""
    chosen = set(rng.permutation(len(sites))[: max(1, len(sites) // 4)].tolist())
    return [float(index in chosen) for index in range(len(sites))]


def scattered(sites: Sequence[AdapterSite], rng: np.random.Generator) -> list[float]:
    """Return exponentially distributed weights: every site needs another rank."""
    return [float(weight) for weight in rng.exponential(size=len(sites))]


def _places(sites: Sequence[AdapterSite]) -> list[float]:
    """Return the position of each site's block in [0, 1)."""
    blocks = sorted({site.layer for site in sites})
    return [blocks.index(site.layer) / len(blocks) for site in sites]


PATTERNS: Mapping[str, Callable[[Sequence[AdapterSite], np.random.Generator], list[float]]] = MappingProxyType(
    {"flat": flat, "one_family": one_family, "early": early, "late": late, "sparse": sparse, "random": scattered}
)
"""Name -> function that gives every site a weight."""


@dataclass(frozen=True, kw_only=True)
class Planted(RankMethod):
    """Ranks in proportion to a pattern's weights, by apportionment within the budget, at least 1 everywhere.

    A planted teacher has the ranks of this method, so that it is the oracle of a study of that teacher.
    """

    name: ClassVar[str] = "planted"
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
