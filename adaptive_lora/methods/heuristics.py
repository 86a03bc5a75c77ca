"""Methods without data: uniform ranks, and the patterns of the reference study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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

    @property
    def rank_label(self) -> str:
        """Return `r16`."""
        return f"r{self.rank}"

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

    @property
    def rank_label(self) -> str:
        """Return `r16`."""
        return f"r{self.rank}"

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the three ranks."""
        return RankRequest(ranks=tuple(self._at(_position(site, sites)) for site in sites))

    def _at(self, position: float) -> float:
        factor = 0.6 if position < 0.3 else 1.2 if position < 0.7 else 1.0
        return max(1.0, self.rank * factor)
