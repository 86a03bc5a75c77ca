"""Integer ranks under a parameter budget, within the minimum and maximum ranks that a method may give."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_lora.errors import AllocationError


def fit_to_budget(
    weights: Sequence[float],
    costs: Sequence[int],
    lower: Sequence[int],
    upper: Sequence[int],
    budget: int,
    multiple: int = 1,
) -> list[int]:
    """Give ranks in proportion to weights until no site can take one more within the budget.

    A divisor method of apportionment (D'Hondt/Jefferson; Balinski & Young 1982, "Fair
    Representation"): the next rank goes to the site with the smallest (rank + 1) / weight, so the
    result is floor(t·weight) for the largest affordable t, and the remaining budget still goes to
    sites that fit. Sites of equal cost keep the order of their weights.

    Args:
        weights: wanted share of each site, relative to the others; non-negative.
        costs: parameters per rank of each site.
        lower: minimum rank of each site.
        upper: maximum rank of each site.
        budget: maximum total number of parameters.
        multiple: step between allowed ranks; `lower` and `upper` are multiples of it.

    Returns:
        One rank per site; the unspent budget is below the cost of one more step at every site that
        is not at its `upper`.

    Raises:
        AllocationError: the budget is below the minimum or above the maximum possible cost.
    """
    left = budget - check_budget(costs, lower, upper, budget)
    ranks = list(lower)
    queue = [
        (_claim(rank + multiple, weight), index)
        for index, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
        if rank < upper[index]
    ]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        if costs[index] * multiple > left:
            continue
        ranks[index] += multiple
        left -= costs[index] * multiple
        if ranks[index] < upper[index]:
            heapq.heappush(queue, (_claim(ranks[index] + multiple, weights[index]), index))
    return ranks


def check_budget(costs: Sequence[int], lower: Sequence[int], upper: Sequence[int], budget: int) -> int:
    """Return the number of parameters at the minimum ranks.

    Raises:
        AllocationError: the budget is below the minimum or above the maximum possible cost.
    """
    least = sum(cost * rank for cost, rank in zip(costs, lower, strict=True))
    most = sum(cost * rank for cost, rank in zip(costs, upper, strict=True))
    if budget < least:
        raise AllocationError(
            f"budget of {budget:,} parameters is too small: the least ranks "
            f"({min(lower)} or more a site) already cost {least:,}; raise the budget, lower "
            "min_rank or multiple, or narrow the placement."
        )
    if budget > most:
        raise AllocationError(
            f"budget of {budget:,} parameters cannot be used: the greatest ranks cost {most:,}; "
            "lower the budget, raise max_rank or the caps, or widen the placement."
        )
    return least


def _claim(rank: int, weight: float) -> float:
    return rank / weight if weight > 0 else float("inf")


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
