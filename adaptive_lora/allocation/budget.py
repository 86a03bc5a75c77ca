"""Integer ranks under a parameter budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from adaptive_lora.errors import AllocationError


def fit_to_budget(
    weights: Sequence[float],
    costs: Sequence[int],
    lower: Sequence[int],
    upper: Sequence[int],
    budget: int,
) -> list[int]:
    """Give ranks in proportion to weights until no site can take one more within the budget.

    A divisor method of apportionment (D'Hondt/Jefferson; Balinski & Young 1982, "Fair
    Representation"): the next rank goes to the site with the smallest (rank + 1) / weight, so the
    result is floor(t·weight) for the largest affordable t, and what is then left over still goes to
    sites that fit. Sites of equal cost keep the order of their weights.

    Args:
        weights: what each site should get relative to the others; non-negative.
        costs: parameters per rank of each site.
        lower: least rank of each site.
        upper: greatest rank of each site.
        budget: most parameters in all.

    Returns:
        One rank per site; the slack is below the cost of every site that is not at its `upper`.

    Raises:
        AllocationError: the budget is below the least or above the greatest possible cost.
    """
    least = sum(cost * rank for cost, rank in zip(costs, lower, strict=True))
    most = sum(cost * rank for cost, rank in zip(costs, upper, strict=True))
    if budget < least:
        raise AllocationError(
            f"budget of {budget:,} parameters is too small: the least ranks "
            f"({min(lower)} or more a site) already cost {least:,}; raise the budget or narrow "
            "the placement."
        )
    if budget > most:
        raise AllocationError(
            f"budget of {budget:,} parameters cannot be used: the greatest ranks cost {most:,}; "
            "lower the budget or widen the placement."
        )
    ranks, left = list(lower), budget - least
    queue = [
        (_claim(rank, weight), index)
        for index, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
        if rank < upper[index]
    ]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        if costs[index] > left:
            continue
        ranks[index] += 1
        left -= costs[index]
        if ranks[index] < upper[index]:
            heapq.heappush(queue, (_claim(ranks[index], weights[index]), index))
    return ranks


def _claim(rank: int, weight: float) -> float:
    return (rank + 1) / weight if weight > 0 else float("inf")
