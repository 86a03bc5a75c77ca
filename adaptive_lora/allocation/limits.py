"""Minimum and maximum ranks that a method may give, and choosing components by value within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_lora.allocation.budget import check_budget
from adaptive_lora.allocation.site import ATTENTION_ROLES, FEED_FORWARD_ROLES, AdapterSite
from adaptive_lora.allocation.spec import MethodSpec
from adaptive_lora.errors import AllocationError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """Limits of the ranks of some sites, in their order; all are multiples of `multiple`."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    multiple: int = 1

    def clipped(self, rank: int, site: int) -> int:
        """Return the nearest allowed rank at a site, not above `rank` where that is possible."""
        down = rank // self.multiple * self.multiple
        return min(max(down, self.lower[site]), self.upper[site])

    def by_value(
        self, values: Sequence[Sequence[float]], costs: Sequence[int], budget: int, *, one_threshold: bool
    ) -> list[int]:
        """Return the ranks from taking components in falling order of value within a budget.

        Components come in units of `multiple`, each worth the mean of its components.

        Args:
            values: per site, the value of each component, not increasing; its length bounds the
                site's rank.
            costs: parameters per rank of each site.
            budget: maximum total number of parameters.
            one_threshold: stop at the first unit that does not fit, so that one threshold separates
                kept from dropped components; otherwise continue with the sites that still fit.

        Raises:
            AllocationError: the minimum ranks cost more than the budget, the maximum ranks less, or
                a site has fewer components than its minimum rank.
        """
        most = [min(high, len(row)) for high, row in zip(self.upper, values, strict=True)]
        if any(low > high for low, high in zip(self.lower, most, strict=True)):
            raise AllocationError(
                f"min_rank {max(self.lower)} is above the {min(map(len, values))} components that "
                "a site has to choose from; lower it, or raise start_rank (truncate) or rho (eva)."
            )
        left = budget - check_budget(costs, self.lower, most, budget)
        ranks, step = list(self.lower), self.multiple
        units = sorted(
            (-sum(row[start : start + step]) / step, site, start)
            for site, row in enumerate(values)
            for start in range(ranks[site], most[site] - step + 1, step)
        )
        full = [False] * len(costs)
        for _, site, _ in units:
            full[site] = full[site] or costs[site] * step > left
            if full[site] and one_threshold:
                break
            if not full[site]:
                ranks[site] += step
                left -= costs[site] * step
        return ranks


def rank_limits(spec: MethodSpec, sites: Sequence[AdapterSite], *, least: int = 1) -> RankLimits:
    """Return the limits that a method's options set.

    Args:
        spec: the method.
        sites: sites in the order of the limits returned.
        least: minimum rank where the method sets no `min_rank`.

    Raises:
        AllocationError: no rank is allowed at a site.
    """
    both = [_limits(spec, site, least) for site in sites]
    return RankLimits(
        lower=tuple(low for low, _ in both), upper=tuple(high for _, high in both), multiple=spec.multiple
    )


def _limits(spec: MethodSpec, site: AdapterSite, least: int) -> tuple[int, int]:
    caps = [site.max_rank, spec.max_rank]
    caps += [spec.attention_cap] if site.role in ATTENTION_ROLES else []
    caps += [spec.feed_forward_cap] if site.role in FEED_FORWARD_ROLES else []
    most = min(cap for cap in caps if cap is not None)
    wanted = least if spec.min_rank is None else spec.min_rank
    low = -(-wanted // spec.multiple) * spec.multiple
    high = most // spec.multiple * spec.multiple
    if low > high:
        raise AllocationError(
            f"{spec.label}: no rank is allowed at {site.name}: required a multiple of "
            f"{spec.multiple} from {wanted} to {most}; change min_rank, max_rank, the caps "
            "or multiple, or leave the site out by placement or target_names."
        )
    return low, high
