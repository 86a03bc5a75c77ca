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
