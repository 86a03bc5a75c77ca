"""Taking components by value within limits: one threshold, or on while there is room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.allocation.budget import RankLimits
from adaptive_lora.errors import AllocationError

Row = tuple[list[float], int, int, int]
"""Components of a site, its cost, and how far its limits lie inside 0 and all components."""
ROWS = st.lists(
    st.tuples(
        st.lists(st.floats(0, 10), min_size=4, max_size=9), st.integers(1, 9), st.integers(0, 1), st.integers(2, 4)
    ),
    min_size=1,
    max_size=6,
)


def case(rows: list[Row], multiple: int) -> tuple[RankLimits, list[list[float]], list[int]]:
    """Return limits, values and costs."""
    limits = RankLimits(
        lower=tuple(low * multiple for _, _, low, _ in rows),
        upper=tuple(high // multiple * multiple or multiple for _, _, _, high in rows),
        multiple=multiple,
    )
    return limits, [sorted(row, reverse=True) for row, *_ in rows], [cost for _, cost, *_ in rows]


@given(ROWS, st.sampled_from([1, 2]), st.floats(0, 1), st.booleans())
def test_limits_budget_and_order_hold(rows: list[Row], multiple: int, share: float, one_threshold: bool) -> None:
    limits, values, costs = case(rows, multiple)
    least = sum(c * low for c, low in zip(costs, limits.lower, strict=True))
    most = sum(c * high for c, high in zip(costs, limits.upper, strict=True))
    budget = round(least + share * (most - least))
    ranks = limits.by_value(values, costs, budget, one_threshold=one_threshold)
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert left >= 0
    for rank, low, high in zip(ranks, limits.lower, limits.upper, strict=True):
        assert low <= rank <= high
        assert rank % multiple == 0

    def unit(site: int, start: int) -> float:
        return sum(values[site][start : start + multiple])

    sites = range(len(rows))
    kept = [unit(i, s) for i in sites for s in range(limits.lower[i], ranks[i], multiple)]
    cut = [(unit(i, s), costs[i] * multiple) for i in sites for s in range(ranks[i], limits.upper[i], multiple)]
    if one_threshold and cut:
        assert not kept or min(kept) >= max(value for value, _ in cut) - 1e-12
        assert left < max(cost for _, cost in cut)
    if not one_threshold:
        assert not cut or left < min(cost for _, cost in cut)


def test_what_cannot_be_met_is_said() -> None:
    limits = RankLimits(lower=(2, 2), upper=(4, 4))
    values, costs = [[3.0, 2.0, 1.0, 0.5]] * 2, [10, 10]
    with pytest.raises(AllocationError, match="already cost 40"):
        limits.by_value(values, costs, 39, one_threshold=True)
    with pytest.raises(AllocationError, match="greatest ranks cost 80"):
        limits.by_value(values, costs, 81, one_threshold=True)
    with pytest.raises(AllocationError, match="min_rank 2 is above the 1 components"):
        limits.by_value([[1.0], [1.0]], costs, 40, one_threshold=True)
