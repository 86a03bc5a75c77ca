"""Methods that follow a measured importance profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.request import METRICS, RANK, SPECTRAL_METRICS, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option


@dataclass(frozen=True, kw_only=True)
class Empirical(RankMethod):
    """Ranks in proportion to measured importance per parameter.

    GoRA's rule (2502.12171): rank proportional to share of importance over cost, kept within half
    and four times the uniform rank of the budget. Departure: GoRA clips after rounding and so
    misses its budget; here the integer ranks fill it (that of `uniform` at `rank` where none is
    given) within one site's cost.
    """

    name: ClassVar[str] = "empirical"
    metric: str = option(
        "weight_gradient", "importance metric that ranks follow", limits=Limits(choices=METRICS), label="{}"
    )
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return shares of importance per parameter as proportions under a budget."""
        return RankRequest(
            ranks=tuple(per_parameter("empirical", sites, profile)),
            bounds=(0.5, 4.0),
            budget=uniform_cost(sites, self.rank),
        )


@dataclass(frozen=True, kw_only=True)
class Proportional(RankMethod):
    """Ranks in proportion to (importance per parameter)^(1/p).

    If the i-th rank of a site gains a·i^-p, the best ranks are proportional to (a / cost)^(1/p) (by a
    Lagrange multiplier on the budget): p = 1 follows importance, p = 2 its root, and a large p is
    nearly uniform; p can also be fitted to the profile's spectra. Unlike `empirical` it has no limits
    of its own.
    """

    name: ClassVar[str] = "proportional"
    metric: str = option("weight_gradient", "importance metric that ranks follow", limits=Limits(choices=METRICS))
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)
    p: float | None = option(
        2.0,
        "exponent p of a rank's gain i^-p; larger values give flatter ranks; none: fitted to the spectra",
        limits=Limits(above=0),
    )

    @property
    def rank_label(self) -> str:
        """Return `r16-p2` or `r16-pfit`, with the metric where it is not the default."""
        metric = "" if self.metric == "weight_gradient" else f"-{self.metric}"
        return f"r{self.rank}-p" + ("fit" if self.p is None else f"{self.p:g}") + metric

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return shares to the power 1/p as proportions under a budget."""
        values = per_parameter("proportional", sites, profile)
        largest, p = max(values), self.p or _fitted_decay(sites, profile)
        return RankRequest(
            ranks=tuple((value / largest) ** (1 / p) for value in values), budget=uniform_cost(sites, self.rank)
        )


def _fitted_decay(sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> float:
    """Return p of i^-p: the median over sites of minus the slope of log gain on log rank.

    Raises:
        AllocationError: there are no spectra, none has three components above zero, or they are flat.
    """
    slopes = []
    for spectrum in _spectra(sites, profile):
        worth = np.asarray([value for value in spectrum if value > 0])
        if len(worth) >= 3:
            slopes.append(np.polyfit(np.log(np.arange(1, len(worth) + 1)), np.log(worth), 1)[0])
    decay = -float(np.median(slopes)) if slopes else 0.0
    if decay < 0.05:
        raise AllocationError(
            "proportional cannot fit p: the spectra are flat or have fewer than three components "
            "above zero; give p, or use more calibration batches."
        )
    return decay


def _spectra(sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> list[tuple[float, ...]]:
    if profile is None or profile.spectra is None:
        raise AllocationError(
            f"proportional with p=none needs a spectrum per site. Metrics that have one: {', '.join(SPECTRAL_METRICS)}."
        )
    return [profile.spectra[site.name] for site in sites]


def per_parameter(method: str, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> list[float]:
    """Return importance over cost of each site.

    Raises:
        AllocationError: there is no profile, or it is degenerate.
    """
    if profile is None:
        raise AllocationError(
            f"{method} needs an importance profile; none was given (`adaptive-lora profile` writes one)."
        )
    values = [profile.scores[site.name] for site in sites]
    if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
        raise AllocationError(
            f"the {profile.metric} profile is degenerate (all zero, negative or non-finite); "
            "use more calibration batches or another metric."
        )
    return [value / site.parameters_per_rank for value, site in zip(values, sites, strict=True)]
