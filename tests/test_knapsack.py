"""Greedy, exact and the bound against every possible solution, on cases small enough for that."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.allocation.knapsack import Items, exact, greedy

Rows = list[tuple[int, list[float]]]

# Gains from few values, so that ties and gaps occur; costs with and without a common divisor.
gain = st.one_of(st.floats(1e-6, 10), st.sampled_from([0.0, 1.0, 2.0, 4.0]))
rows = st.lists(st.tuples(st.integers(1, 9), st.lists(gain, min_size=1, max_size=4)), min_size=1, max_size=5)


def offered(sites: Rows, budget: int, factor: int = 1) -> Items:
    """Return the items of sites given as (cost, gains)."""
    longest = max(len(gains) for _, gains in sites)
    table = np.zeros((len(sites), longest))
    for row, (_, gains) in zip(table, sites, strict=True):
        row[: len(gains)] = sorted(gains, reverse=True)
    costs = np.array([cost * factor for cost, _ in sites], dtype=np.int64)
    return Items.offer(table, costs, budget)


def best_of_all(sites: Rows, budget: int, factor: int = 1) -> float:
    """Return the optimum by trying every combination of units."""
    best = 0.0
    for units in product(*(range(len(gains) + 1) for _, gains in sites)):
        if sum(n * c * factor for n, (c, _) in zip(units, sites, strict=True)) <= budget:
            kept = (sorted(g, reverse=True)[:n] for n, (_, g) in zip(units, sites, strict=True))
            best = max(best, sum(map(sum, kept)))
    return best


@given(rows, st.integers(0, 60), st.sampled_from([1, 64]))
def test_exact_is_the_best_and_the_bound_holds(sites: Rows, budget: int, factor: int) -> None:
    budget *= factor
    items = offered(sites, budget, factor)
    best = best_of_all(sites, budget, factor)
    counts = exact(items)
    assert counts is not None
    assert int(counts @ items.costs_K) <= budget
    assert items.gain_of(counts) == pytest.approx(best)
    quick = greedy(items)
    assert int(quick @ items.costs_K) <= budget
    assert items.gain_of(quick) <= best * (1 + 1e-9)
    assert items.bound() >= best * (1 - 1e-9)
    largest = max((max(gains) for _, gains in sites), default=0.0)
    assert items.gain_of(quick) >= items.bound() - largest - 1e-9  # short of one item at most


@given(rows, st.integers(0, 60))
def test_greedy_leaves_no_room_for_a_gaining_unit(sites: Rows, budget: int) -> None:
    items = offered(sites, budget)
    counts = greedy(items)
    left = budget - int(counts @ items.costs_K)
    for cost, count, sums in zip(items.costs_K, counts, items.sums, strict=True):
        assert count + 1 == len(sums) or cost > left


@given(rows, st.integers(0, 60))
def test_units_add_up_to_the_counts(sites: Rows, budget: int) -> None:
    items = offered(sites, budget)
    units = items.units(greedy(items), len(sites))
    spent = sum(int(n) * cost for n, (cost, _) in zip(units, sites, strict=True))
    gained = sum(sum(sorted(g, reverse=True)[:n]) for n, (_, g) in zip(units, sites, strict=True))
    counts = greedy(items)
    assert spent == int(counts @ items.costs_K)
    assert gained == pytest.approx(items.gain_of(counts))


def test_the_repair_mends_the_known_counterexample() -> None:
    """Gain per parameter prefers (cost 2, gain 3); the budget of 3 is better spent on (3, 4)."""
    items = offered([(2, [3.0]), (3, [4.0])], 3)
    assert items.gain_of(items.prefix_K) == 3.0
    assert items.gain_of(greedy(items)) == 4.0
    assert items.bound() == pytest.approx(3 + 4 / 3)


def test_exact_beats_the_repair_somewhere() -> None:
    """Two units of 3 fill a budget of 6; greedy keeps the 5 and the repair exchanges one by one."""
    sites = [(5, [5.5]), (3, [3.0, 3.0])]
    items = offered(sites, 6)
    counts = exact(items)
    assert counts is not None
    assert items.gain_of(greedy(items)) == 5.5
    assert items.gain_of(counts) == 6.0


def test_costs_without_a_divisor_are_left_to_greedy() -> None:
    sites = [(100_003, [3.0] * 4), (99_991, [2.0] * 4), (50_021, [1.5] * 4)]
    assert exact(offered(sites, 300_000)) is None
    assert exact(offered([(cost // 1000 * 1000, g) for cost, g in sites], 300_000)) is not None


@pytest.mark.parametrize(
    ("name", "costs"),
    [
        ("GPT-2 small", [768 * 4, 768 * 2, 768 * 5]),
        ("Llama-3-8B", [4096 * 2, 4096 + 1024, 4096 + 14336]),
        ("Llama-3-70B", [8192 * 2, 8192 + 1024, 8192 + 28672]),
        ("Qwen2.5-0.5B", [896 * 2, 896 + 128, 896 + 4864]),
        ("Gemma-2-2B", [2304 + 2048, 2304 + 1024, 2304 + 9216]),
    ],
)
def test_common_widths_are_solved_exactly(name: str, costs: list[int]) -> None:
    draw = np.random.default_rng(0)
    sites = [(cost, draw.exponential(cost, size=32).tolist()) for cost in costs * 40]
    items = offered(sites, 8 * 40 * sum(costs) + 1)
    counts = exact(items)
    assert counts is not None
    assert items.gain_of(greedy(items)) <= items.gain_of(counts) <= items.bound() * (1 + 1e-12)
