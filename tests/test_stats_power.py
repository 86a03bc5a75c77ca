"""Power, variance components, fronts and agreement against closed forms and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.power import TTestPower

from adaptive_lora.analysis import stats


def crossed(rng: np.random.Generator, seeds: int, examples: int, spreads: tuple[float, float, float]) -> np.ndarray:
    """Return differences with known standard deviations of seed, example and residual."""
    seed, example, residual = spreads
    return (
        rng.normal(0, seed, (seeds, 1))
        + rng.normal(0, example, (1, examples))
        + rng.normal(0, residual, (seeds, examples))
    )


def test_components_are_those_of_the_analysis_of_variance() -> None:
    seeds, examples = 5, 7
    diff = crossed(np.random.default_rng(0), seeds, examples, (0.5, 1.0, 0.3))
    found = stats.variance_components(diff, np.ones_like(diff), crossed=True)
    frame = pd.DataFrame(
        [(s, e, diff[s, e]) for s in range(seeds) for e in range(examples)], columns=["seed", "example", "y"]
    )
    table = anova_lm(smf.ols("y ~ C(seed) + C(example)", frame).fit())
    squares = (table["sum_sq"] / table["df"]).to_dict()
    assert found is not None
    assert found.residual == pytest.approx(squares["Residual"])
    assert found.seed == pytest.approx((squares["C(seed)"] - squares["Residual"]) / examples)
    assert found.example == pytest.approx((squares["C(example)"] - squares["Residual"]) / seeds)


def test_components_are_recovered_and_their_sum_is_the_variance_over_seeds() -> None:
    diff = crossed(np.random.default_rng(1), 300, 300, (0.2, 1.0, 0.5))
    found = stats.variance_components(diff, np.ones_like(diff), crossed=True)
    assert found is not None
    assert math.sqrt(found.seed) == pytest.approx(0.2, rel=0.15)
    assert math.sqrt(found.example) == pytest.approx(1.0, rel=0.15)
    assert math.sqrt(found.residual) == pytest.approx(0.5, rel=0.02)
    assert found.standard_deviation(300) == pytest.approx(diff.mean(axis=1).std(ddof=1))
    assert found.standard_deviation(10**12) == pytest.approx(math.sqrt(found.seed), rel=1e-3)


def test_nested_components_by_hand_and_none_without_two_seeds() -> None:
    # Within: variances 2 and 8, mean 5; between means 1 and 4: 4.5; seed 4.5 - 5 / 2 = 2.
    rows = [np.array([0.0, 2.0]), np.array([2.0, 6.0])]
    found = stats.variance_components(rows, [np.ones(2)] * 2, crossed=False)
    assert found is not None
    assert (found.seed, found.example, found.residual) == pytest.approx((2.0, 0.0, 5.0))
    assert stats.variance_components(rows[:1], [np.ones(2)], crossed=True) is None


def test_components_weigh_by_tokens() -> None:
    rng = np.random.default_rng(2)
    weight = np.tile(rng.integers(1, 30, 50).astype(float), (6, 1))
    diff = weight * crossed(rng, 6, 50, (0.3, 0.4, 0.2))
    found = stats.variance_components(diff, weight, crossed=True)
    per_seed = diff.sum(axis=1) / weight.sum(axis=1)
    assert found is not None
    assert found.standard_deviation(50) == pytest.approx(per_seed.std(ddof=1))


def test_examples_for_power_is_the_fewest_that_the_formula_allows() -> None:
    parts = stats.Components(seed=0.0001, example=0.04, residual=0.09, seeds=8, examples=100)
    needed = stats.examples_for_power(0.03, parts, 8)
    assert needed is not None
    for examples, enough in ((needed, True), (needed - 1, False)):
        power = TTestPower().power(0.03 / parts.standard_deviation(examples), 8, 0.05)
        assert bool(power >= 0.8) == enough
    assert stats.examples_for_power(0.005, parts, 8) is None  # the spread between seeds is too much
    assert stats.examples_for_power(0.03, parts, 5) is None  # no p under 0.0625
    assert stats.examples_for_power(0.0, parts, 8) is None


def test_examples_for_new_examples_is_the_normal_formula() -> None:
    parts = stats.Components(seed=0.0, example=1.0, residual=1.0, seeds=8, examples=100)
    # (1.959964 + 0.841621)^2 / 0.1^2 = 784.9, as tables give for one sample at d = 0.1.
    assert stats.examples_for_new_examples(0.1, parts) == 785


def test_sign_flips_of_many_columns_are_those_of_each() -> None:
    diff = np.round(np.random.default_rng(3).normal(0.4, 1, (8, 20)), 1)
    expected = [stats.sign_flip_test(column) for column in diff.T]
    assert stats.sign_flip_ps(diff) == pytest.approx(expected)


def test_simulated_power_is_the_share_of_studies_by_the_real_test() -> None:
    rng = np.random.default_rng(0)  # the same draws as inside, tested one by one
    noise = rng.normal(0, 1 / math.sqrt(2), (9, 200, 4))
    diff = noise[:, :, 1:] - noise[:, :, :1]
    diff[:, :, 0] += 1.5
    for correction in ("holm", "benjamini_hochberg", "max_t"):
        found = 0
        for study in range(200):
            if correction == "max_t":
                p = stats.step_down_max_t(diff[:, study])
            else:
                raw = [stats.sign_flip_test(column) for column in diff[:, study].T]
                p = stats.holm(raw) if correction == "holm" else stats.benjamini_hochberg(raw)
            found += p[0] <= 0.05
        share = stats.simulated_power(1.5, 1.0, 9, comparisons=3, correction=correction, studies=200)
        assert share == pytest.approx(found / 200, abs=0.011)  # max-T's first step only


def test_simulated_power_without_a_difference_is_the_level() -> None:
    found = stats.simulated_power(0.0, 1.0, 8, studies=4_000)
    low, high = scipy_stats.binom.interval(0.999, 4_000, 0.05)
    assert low / 4_000 <= found <= high / 4_000
    assert stats.simulated_power(10.0, 1.0, 5, studies=50) == 0.0  # p cannot reach 0.05


def test_checked_seeds_stand_by_the_formula_and_max_t_takes_fewer() -> None:
    seeds, simulated = stats.checked_seeds(0.9, 1.0)
    assert seeds == stats.seeds_for_power(0.9, 1.0)
    assert simulated == pytest.approx(0.8, abs=0.05)
    strict, _ = stats.checked_seeds(0.9, 1.0, comparisons=10)
    joint, there = stats.checked_seeds(0.9, 1.0, comparisons=10, correction="max_t")
    assert strict is not None
    assert joint is not None
    assert there is not None
    assert seeds < joint < strict
    assert stats.checked_seeds(0.1, 1.0) == (stats.seeds_for_power(0.1, 1.0), None)
    assert stats.checked_seeds(0.0, 1.0) == (None, None)


def brute_force_front(cost: list[int], loss: list[int]) -> list[bool]:
    pairs = list(zip(cost, loss, strict=True))
    return [not any((c <= x and q < y) or (c < x and q <= y) for c, q in pairs) for x, y in pairs]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_pareto_front_by_brute_force(points: list[tuple[int, int]]) -> None:
    cost, loss = ([point[axis] for point in points] for axis in (0, 1))
    assert stats.pareto_front(cost, loss).tolist() == brute_force_front(cost, loss)
    assert stats.pareto_front(cost, loss).any()


def test_front_share_counts_the_draws_of_seeds() -> None:
    cost = np.tile([1.0, 2.0], (2, 1))
    loss = np.array([[1.0, 0.5], [1.0, 2.5]])  # the second wins in one seed of two, by less
    # Draws of 2 seeds: (0,0) 0.5 < 1 on the front; (0,1), (1,0) 1.5 > 1 off; (1,1) off.
    share = stats.front_share(cost, loss, draws=8_000)
    assert share[0] == 1.0
    assert share[1] == pytest.approx(1 / 4, abs=0.02)


def test_front_gain_is_the_hypervolume_over_the_range() -> None:
    # Budgets 1 to 8 (three doublings): 2.0 up to 2, 1.0 up to 4, 0.5 up to 8; reference 3.
    gain = stats.front_gain([1, 2, 4], [2.0, 1.0, 0.5], low=1, high=8, reference=3.0)
    assert gain == pytest.approx((1.0 + 2.0 + 2.5) / 3)
    # A point that is worse at more parameters changes nothing; one above the range neither.
    more = stats.front_gain([1, 2, 4, 4, 16], [2, 1, 0.5, 9, 0], low=1, high=8, reference=3.0)
    assert more == pytest.approx(gain)
    inside = stats.front_gain([1, 2, 4], [2.0, 1.0, 0.5], low=2, high=4, reference=3.0)
    assert inside == pytest.approx(2.0)
    with pytest.raises(ValueError, match="required low < high"):
        stats.front_gain([2], [1.0], low=1, high=8, reference=3.0)


def test_first_reached_by_straight_lines_or_never() -> None:
    assert stats.first_reached([0, 10, 20], [3.0, 2.0, 1.0], 1.5) == pytest.approx(15)
    assert stats.first_reached([0, 10, 20], [3.0, 1.0, 2.0], 2.0) == pytest.approx(5)
    assert stats.first_reached([0, 10], [3.0, 2.0], 1.9) is None
    assert stats.first_reached([0, 10], [3.0, math.nan], 1.9) is None
    assert stats.first_reached([0, 10, 20], [3.0, math.nan, 1.0], 1.9) == 20
    assert stats.first_reached([5, 10], [1.0, 0.5], 1.0) == 5


def test_rank_agreement_is_spearmans_formula() -> None:
    # Without ties: 1 - 6 sum(d^2) / (n (n^2 - 1)).
    first = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    other = [6, 5, 1, 4, 2, 7, 8, 10, 3, 9]
    squares = sum((a - b) ** 2 for a, b in zip(first, other, strict=True))
    matrix = stats.rank_agreement([first, other, [4.0] * 10])
    assert matrix[0][1] == matrix[1][0] == pytest.approx(1 - 6 * squares / (10 * 99))
    assert matrix[0][0] == 1.0
    assert matrix[2] == (None, None, None)
    rows = np.random.default_rng(0).integers(0, 6, (7, 24))
    many = stats.rank_agreement(rows)
    expected = scipy_stats.spearmanr(rows, axis=1)[0]
    assert np.array(many) == pytest.approx(expected)
    apart = expected[np.triu_indices(7, 1)]
    assert stats.mean_agreement(rows) == pytest.approx(apart.mean())
    assert stats.mean_agreement([first, [4.0] * 10]) is None


def test_superiority_has_wilsons_interval() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263: 0.2553 to 0.3662.
    diff = np.concatenate([np.full(81, -1.0), np.full(182, 1.0)])
    effect = stats.paired_effect(diff)
    assert effect.superiority == pytest.approx(81 / 263)
    assert effect.superiority_interval.low == pytest.approx(0.2553, abs=5e-5)
    assert effect.superiority_interval.high == pytest.approx(0.3662, abs=5e-5)


def test_interval_of_draws_is_expanded_for_few_seeds() -> None:
    draws = np.arange(10_001) / 10_000
    few = stats.interval_of_draws(draws, estimate=0.5, seeds=6, confidence=0.95)
    tail = (1 - stats.expanded_confidence(0.95, 6)) / 2
    assert (few.low, few.high) == pytest.approx((tail, 1 - tail))
    for seeds, values in ((1, draws), (6, np.ones(10)), (3, np.ones(10))):
        none = stats.interval_of_draws(values, estimate=0.5, seeds=seeds, confidence=0.95)
        assert (none.low, none.high, none.method) == (None, None, "none")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_draws_of_a_mean_over_few_seeds_give_the_t_interval(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(0.3, 1.0, seeds)
    every = np.array(list(itertools.product(values, repeat=seeds))).mean(axis=1)
    found = stats.interval_of_draws(every, estimate=float(values.mean()), seeds=seeds, confidence=0.95)
    expected = stats.t_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.method == expected.method == stats.STUDENT


@pytest.mark.parametrize(
    ("comparisons", "correction", "fewest"),
    [(1, "holm", 6), (5, "holm", 8), (5, "max_t", 6), (5, "benjamini_hochberg", 6)],
)
def test_fewest_seeds_are_those_at_which_the_test_can_find_anything(
    comparisons: int, correction: stats.Correction, fewest: int
) -> None:
    found = stats.fewest_seeds(0.05, comparisons=comparisons, correction=correction)
    assert found == fewest
    if correction == "benjamini_hochberg":
        return  # its least p needs all methods to differ, not one as simulated
    powers = [
        stats.simulated_power(20.0, 1.0, seeds, comparisons=comparisons, correction=correction, studies=100)
        for seeds in (fewest - 1, fewest)
    ]
    assert powers[0] == 0.0
    assert powers[1] > 0.9


def test_power_grows_with_everything_that_should_help() -> None:
    powers = [stats.paired_power(0.5, 1.0, n) for n in range(3, 40)]
    assert all(after > before for before, after in itertools.pairwise(powers))


def test_above_25_comparisons_the_formula_stands_alone() -> None:
    # 1,023 random flips cannot show a p below 0.05 / 99, however many seeds there are.
    formula = stats.seeds_for_power(1.5, 1.0, alpha=0.05 / 99)
    assert formula is not None
    assert stats.checked_seeds(1.5, 1.0, comparisons=99) == (formula, None)
    assert stats.checked_seeds(1.5, 1.0, comparisons=5, studies=50)[1] is not None
