"""Allocators: each turns sites (and, where it is data-driven, scores) into a demand for ranks.

An allocator is a frozen dataclass whose fields are its options; `METHODS` names them. To add one,
write the dataclass and add a line to `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.errors import AllocationError
from adaptive_lora.options import Limits, option
from adaptive_lora.sites import ATTENTION_ROLES, AdapterSite

_RANK = Limits(low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankDemand:
    """What an allocator asks for, before integers and budgets."""

    ranks: tuple[float, ...]
    """Wanted rank per site; rounded down without a budget, taken as proportions with one."""
    bounds: tuple[float, float] | None = None
    """Least and greatest rank under a budget, as multiples of the rank that uniform would have;
    None: 1 to the site's smaller side."""
    budget: int | None = None
    """Parameters that the allocator spends when the user names no budget."""


class Allocator(Protocol):
    """Decides how ranks are spread."""

    @property
    def metric(self) -> str | None:
        """Importance profile that it needs, or None for a heuristic."""

    @property
    def rank_label(self) -> str:
        """Short form of its options for run names, such as `r16-4`."""

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return the ranks wanted for these sites; scores are keyed by site name."""


def _position(site: AdapterSite, sites: Sequence[AdapterSite]) -> float:
    """Return i/(L-1): 0 for the first block that has a site here, 1 for the last."""
    layers = [other.layer for other in sites]
    first, last = min(layers), max(layers)
    return (site.layer - first) / (last - first) if last > first else 0.0


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """One rank for every site: what most people do (Hu et al. 2021)."""

    metric: ClassVar[str | None] = None
    rank: int = option(16, "rank of every site", limits=_RANK)

    @property
    def rank_label(self) -> str:
        """Return `r16`."""
        return f"r{self.rank}"

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return the same rank everywhere."""
        return RankDemand(ranks=(float(self.rank),) * len(sites))


@dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """Rank falls (or rises) linearly with depth, rounded down in each layer.

    rank(i) = high - (high - low)·i/(L-1) for `down`, mirrored for `up`. The published study
    describes 16 to 4; with every layer rounded down that is 3,751,936 parameters on
    DialoGPT-medium.
    """

    metric: ClassVar[str | None] = None
    rank: int = option(16, "rank at the high end", limits=_RANK)
    low_rank: int = option(4, "rank at the low end", limits=_RANK)
    direction: str = option(
        "down",
        "'down': high at the input, low at the output; 'up': the reverse",
        limits=Limits(choices=("down", "up")),
    )

    @property
    def rank_label(self) -> str:
        """Return `r16-4`, or `r4-16` for the rising direction."""
        ends = (self.rank, self.low_rank)
        return "r{}-{}".format(*(ends if self.direction == "down" else ends[::-1]))

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return the linear ramp over the layers."""
        if self.low_rank > self.rank:
            raise AllocationError(
                f"linear_decay needs low_rank <= rank; got low_rank={self.low_rank}, "
                f"rank={self.rank}; use direction=up for ranks that rise with depth."
            )
        return RankDemand(ranks=tuple(self._at(_position(site, sites)) for site in sites))

    def _at(self, position: float) -> float:
        if self.direction == "up":
            position = 1.0 - position
        # The ramp hits whole ranks at some layers; floating point must not push those down by one.
        return round(self.rank - (self.rank - self.low_rank) * position, 9)


@dataclass(frozen=True, kw_only=True)
class AttentionHeavy:
    """Attention sites get `rank`, all other sites `feed_forward_rank` (half of it by default)."""

    metric: ClassVar[str | None] = None
    rank: int = option(16, "rank of attention sites", limits=_RANK)
    feed_forward_rank: int | None = option(
        None, "rank of feed-forward sites; none: half of rank", limits=_RANK
    )

    @property
    def rank_label(self) -> str:
        """Return `r16-8`: attention, then feed-forward."""
        return f"r{self.rank}-{self._feed_forward}"

    @property
    def _feed_forward(self) -> int:
        return self.feed_forward_rank or max(1, self.rank // 2)

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return the two levels."""
        return RankDemand(
            ranks=tuple(
                float(self.rank if site.role in ATTENTION_ROLES else self._feed_forward)
                for site in sites
            )
        )


@dataclass(frozen=True, kw_only=True)
class ThreeBand:
    """Less rank early, more in the middle: x0.6, x1.2, x1.0 by depth.

    The published study called this pattern "empirical", yet it uses no data; band edges are at
    i/(L-1) = 0.3 and 0.7.
    """

    metric: ClassVar[str | None] = None
    rank: int = option(16, "base rank, multiplied per band and rounded down", limits=_RANK)

    @property
    def rank_label(self) -> str:
        """Return `r16`."""
        return f"r{self.rank}"

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return the three levels."""
        return RankDemand(ranks=tuple(self._at(_position(site, sites)) for site in sites))

    def _at(self, position: float) -> float:
        factor = 0.6 if position < 0.3 else 1.2 if position < 0.7 else 1.0
        return max(1.0, self.rank * factor)


@dataclass(frozen=True, kw_only=True)
class Empirical:
    """Ranks in proportion to measured importance per parameter.

    GoRA's rule (2502.12171): rank proportional to share of importance over cost, kept within half
    and four times the uniform rank of the budget. Departure: GoRA clips after rounding and so
    misses its budget; here the integer ranks fill it (that of `uniform` at `rank` where none is
    given) within one site's cost.
    """

    metric: str = option(
        "weight_gradient",
        "importance profile: 'weight_gradient' (mean |w·g|) or 'gradient_norm'",
        limits=Limits(choices=("weight_gradient", "gradient_norm")),
    )
    rank: int = option(16, "its budget is that of uniform at this rank", limits=_RANK)

    @property
    def rank_label(self) -> str:
        """Return `r16`, with the metric where it is not the default."""
        return f"r{self.rank}" + ("" if self.metric == "weight_gradient" else f"-{self.metric}")

    def demand(
        self, sites: Sequence[AdapterSite], scores: Mapping[str, float] | None
    ) -> RankDemand:
        """Return shares of importance per parameter as proportions under a budget."""
        if scores is None:
            raise AllocationError("empirical needs an importance profile; none was given.")
        values = [scores[site.name] for site in sites]
        if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
            raise AllocationError(
                f"the {self.metric} profile is degenerate (all zero, negative or non-finite); "
                "use more calibration batches or another metric."
            )
        return RankDemand(
            ranks=tuple(
                value / site.parameters_per_rank for value, site in zip(values, sites, strict=True)
            ),
            bounds=(0.5, 4.0),
            budget=uniform_cost(sites, self.rank),
        )


METHODS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "uniform": Uniform,
        "linear_decay": LinearDecay,
        "attention_heavy": AttentionHeavy,
        "three_band": ThreeBand,
        "empirical": Empirical,
    }
)
"""Name on the command line and in study files -> options class of the allocator."""
