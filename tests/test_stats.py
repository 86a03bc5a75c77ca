"""Statistics against closed forms, published values, brute force and simulation."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from adaptive_lora.analysis import stats

# Darwin's maize, cross- minus self-fertilised, as Fisher 1935 (The Design of Experiments, section
# 21) uses it: 863 of 32,768 sign patterns give a sum of 314 or more.
MAIZE = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48.0])
# Student's sleep data (R: `sleep`), drug 1 minus drug 2.
SLEEP = np.array([-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4])
# Hollander & Wolfe 1973, p. 29, as in the example of R's `wilcox.test` (first minus second visit).
DEPRESSION = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]) - np.array(
    [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
)


def brute_force_p(diff: np.ndarray) -> float:
    means = [np.dot(signs, diff) for signs in itertools.product((1, -1), repeat=diff.size)]
    return float(np.mean(np.abs(means) >= abs(diff.sum()) - 1e-9))


def test_sign_flip_gives_fishers_published_count() -> None:
    assert stats.sign_flip_test(MAIZE) == pytest.approx(2 * 863 / 2**15, abs=1e-15)
    assert stats.sign_flip_test(MAIZE, alternative="greater") == pytest.approx(863 / 2**15)


@pytest.mark.parametrize("seeds", [1, 2, 5, 6, 8])
def test_one_sided_results_reach_the_attainable_p_and_no_less(seeds: int) -> None:
    diff = -np.arange(1.0, seeds + 1)
    assert stats.sign_flip_test(diff) == stats.attainable_p(seeds) == 2 / 2**seeds
    assert stats.sign_flip_test(diff, alternative="less") == 1 / 2**seeds


def test_six_seeds_are_the_fewest_for_five_per_cent() -> None:
    assert stats.least_seeds(0.05) == 6
    assert stats.least_seeds(0.05 / 5) == 8
    assert stats.attainable_p(5) > 0.05 >= stats.attainable_p(6)


@pytest.mark.parametrize("case", range(6))
def test_sign_flip_equals_brute_force_and_scipy(case: int) -> None:
    rng = np.random.default_rng(case)
    diff = np.round(rng.normal(0.3, 1, 3 + case), 1)  # rounding makes ties
    expected = scipy_stats.permutation_test(
        (diff,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert stats.sign_flip_test(diff) == pytest.approx(brute_force_p(diff), abs=1e-12)
    assert stats.sign_flip_test(diff) == pytest.approx(expected.pvalue, abs=1e-12)


def test_sign_flip_by_random_draws_agrees_and_is_seeded() -> None:
    diff = np.random.default_rng(3).normal(0.2, 1, 25)
    first = stats.sign_flip_test(diff, seed=1)
    assert first == stats.sign_flip_test(diff, seed=1)
    assert first != stats.sign_flip_test(diff, seed=2)
    assert first == pytest.approx(scipy_stats.ttest_1samp(diff, 0).pvalue, abs=0.03)
    assert stats.sign_flip_test(np.full(25, 1.0), draws=999) == 1 / 1000  # never zero


def test_equal_results_are_no_difference() -> None:
    nothing = np.zeros(6)
    assert stats.sign_flip_test(nothing) == 1.0
    assert stats.wilcoxon(nothing) is None
    assert stats.paired_t(nothing) is None
    assert stats.paired_effect(nothing).superiority == 0.5


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [[1.0, 2.0]]])
def test_samples_with_nothing_or_nan_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        stats.sign_flip_test(bad)


def test_false_positive_rate_lies_in_its_binomial_band() -> None:
    rng = np.random.default_rng(0)
    studies = 1500
    p_values = [stats.sign_flip_test(row) for row in rng.laplace(size=(studies, 8))]
    # Exact size: p <= 0.05 is 12 of 256 patterns.
    low, high = scipy_stats.binom.interval(0.999, studies, 12 / 256)
    assert low <= np.sum(np.array(p_values) <= 0.05) <= high


@pytest.mark.parametrize("correct", ["holm", "max_t"])
def test_corrections_hold_the_chance_of_any_false_claim(correct: str) -> None:
    rng = np.random.default_rng(1)
    studies, false_claims = 300, 0
    for _ in range(studies):
        shared = rng.normal(size=(8, 1))  # all methods share the baseline
        diff = shared + rng.normal(size=(8, 4))
        if correct == "holm":
            adjusted = stats.holm([stats.sign_flip_test(column) for column in diff.T])
        else:
            adjusted = stats.step_down_max_t(diff)
        false_claims += bool((adjusted <= 0.05).any())
    assert false_claims <= scipy_stats.binom.ppf(0.999, studies, 0.05)


def test_holm_is_the_published_example_and_statsmodels() -> None:
    # Wikipedia, "Holm-Bonferroni method", example: H1 to H4.
    p = [0.01, 0.04, 0.03, 0.005]
    assert stats.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    random = np.random.default_rng(0).uniform(size=9) ** 3
    assert stats.holm(random) == pytest.approx(multipletests(random, method="holm")[1])
    assert stats.benjamini_hochberg(random) == pytest.approx(multipletests(random, method="fdr_bh")[1])


def test_max_t_of_one_method_is_the_sign_flip_test() -> None:
    diff = np.random.default_rng(5).normal(0.5, 1, (7, 1))
    assert stats.step_down_max_t(diff)[0] == pytest.approx(stats.sign_flip_test(diff[:, 0]))


def test_max_t_by_brute_force_and_reaches_what_holm_cannot() -> None:
    diff = np.random.default_rng(8).normal([-1.0, 0.2, -0.4], 0.5, (6, 3))
    scale = np.sqrt((diff**2).sum(axis=0))
    flips = np.array(list(itertools.product((1, -1), repeat=6)))
    stat, observed = np.abs(flips @ diff) / scale, np.abs(diff.sum(axis=0)) / scale
    first = int(observed.argmax())
    expected = (stat.max(axis=1) >= observed[first] - 1e-12).mean()
    assert stats.step_down_max_t(diff)[first] == pytest.approx(expected)
    rest = [column for column in range(3) if column != first]
    second = max(rest, key=lambda column: observed[column])
    among_rest = (stat[:, rest].max(axis=1) >= observed[second] - 1e-12).mean()
    assert stats.step_down_max_t(diff)[second] == pytest.approx(max(expected, among_rest))
    assert among_rest < (stat.max(axis=1) >= observed[second] - 1e-12).mean()
    clear = np.column_stack([-np.arange(1.0, 7)] * 5) + np.arange(5) * 1e-3
    assert stats.step_down_max_t(clear).min() == 2 / 64
    assert stats.holm([stats.sign_flip_test(c) for c in clear.T]).min() == 5 * 2 / 64


def test_max_t_takes_a_missing_seed_as_no_change() -> None:
    full = -np.arange(1.0, 7)
    short = np.array([-1.0, -2, -3, -4, -5, 0])
    alone = stats.step_down_max_t(short[:, None])[0]
    assert alone == stats.sign_flip_test(short[:5]) == 2 / 32
    both = stats.step_down_max_t(np.column_stack([full, short]))
    assert (both >= [2 / 64, 2 / 32]).all()


def test_published_values_of_t_and_wilcoxon() -> None:
    # R 4: t.test(extra ~ group, data = sleep, paired = TRUE): p-value = 0.002833.
    assert stats.paired_t(SLEEP) == pytest.approx(0.002833, abs=5e-7)
    # R: wilcox.test(x, y, paired = TRUE, alternative = "greater"): p-value = 0.01953.
    assert stats.wilcoxon(DEPRESSION) == pytest.approx(2 * 0.01953, abs=2e-5)


def test_effect_size_and_its_interval() -> None:
    effect = stats.paired_effect(SLEEP)
    # t = -4.0621 (R) over sqrt(10).
    assert effect.d_z == pytest.approx(-4.0621 / np.sqrt(10), abs=2e-5)
    assert effect.superiority == pytest.approx(0.95)  # nine lower, one tie
    low, high = effect.interval.low, effect.interval.high
    assert low is not None
    assert high is not None
    root, t_value = np.sqrt(10), effect.d_z * np.sqrt(10)
    # The definition: at the limits, the observed t is the 97.5 % and 2.5 % point.
    assert scipy_stats.nct.cdf(t_value, 9, low * root) == pytest.approx(0.975, abs=1e-6)
    assert scipy_stats.nct.cdf(t_value, 9, high * root) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("mean", [-50.0, 50.0])
def test_huge_effects_still_have_an_interval(mean: float) -> None:
    effect = stats.paired_effect(mean + np.linspace(-1, 1, 6))
    assert effect.interval.low < effect.d_z < effect.interval.high


def test_expanded_confidence_is_hesterbergs_formula() -> None:
    # By hand for n = 6: t = 2.5706, sqrt(6/5) t = 2.8160, Phi(-2.8160) = 0.002431.
    assert stats.expanded_confidence(0.95, 6) == pytest.approx(1 - 2 * 0.002431, abs=2e-6)
    assert stats.expanded_confidence(0.95, 100_000) == pytest.approx(0.95, abs=1e-5)


def test_bootstrap_interval_holds_its_sample_mean_and_is_seeded() -> None:
    diff = np.array([-0.02, -0.01, -0.03, 0.01, -0.02, -0.015])
    interval = stats.bootstrap_interval(diff)
    assert diff.min() <= interval.low < diff.mean() < interval.high <= diff.max()
    assert interval == stats.bootstrap_interval(diff)
    assert interval != stats.bootstrap_interval(diff, seed=1)
    assert interval.method == "BCa"
    assert not interval.note


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_have_students_interval(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(size=seeds)
    interval = stats.mean_interval(values, confidence=0.9)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.method == "Student's t"


def test_the_bootstrap_begins_where_it_can_cover() -> None:
    values = np.random.default_rng(0).normal(size=8)
    assert stats.mean_interval(values[:6]) == stats.bootstrap_interval(values[:6])
    assert stats.mean_interval(values[:7], confidence=0.99).method == "Student's t"
    assert stats.mean_interval(values, confidence=0.99).method == "BCa"


@pytest.mark.parametrize("make", [stats.mean_interval, stats.t_interval, stats.bootstrap_interval])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.3], "one seed has no standard deviation"),
        ([0.2, 0.2], "all 2 seeds gave the same value"),
        ([0.2] * 7, "all 7 seeds gave the same value"),
    ],
)
def test_no_interval_without_spread_and_the_reason_is_said(
    make: Callable[..., stats.Interval], values: list[float], reason: str
) -> None:
    interval = make(values)
    assert (interval.low, interval.high, interval.method) == (None, None, "none")
    assert interval.note == reason


@pytest.mark.parametrize(("seeds", "studies"), [(2, 4000), (3, 4000), (4, 4000), (5, 4000), (8, 500)])
def test_interval_covers_as_often_as_it_says(seeds: int, studies: int) -> None:
    rng = np.random.default_rng([4, seeds])
    hits = 0
    for row in rng.normal(size=(studies, seeds)):
        interval = stats.mean_interval(row, draws=999)
        hits += interval.low <= 0 <= interval.high
    low, high = scipy_stats.binom.interval(0.999, studies, 0.95)
    assert low <= hits <= high


@pytest.mark.parametrize("between", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_and_examples_are_covered_at_least_as_often(seeds: int, between: float) -> None:
    rng = np.random.default_rng([6, seeds])
    studies, hits, weight = 800, 0, np.ones((seeds, 40))
    for _ in range(studies):
        diff = rng.normal(0, between, (seeds, 1)) + nested(rng, seeds, 40, crossed=True)
        interval = stats.two_way_interval(diff, weight, crossed=True)
        only_seeds = stats.mean_interval(diff.mean(axis=1))
        assert interval.low <= only_seeds.low < only_seeds.high <= interval.high
        hits += interval.low <= 0 <= interval.high
    assert hits >= scipy_stats.binom.ppf(0.001, studies, 0.95)  # errs on the wide side only


def test_few_seeds_with_examples_of_their_own_have_the_interval_over_seeds() -> None:
    diff = nested(np.random.default_rng(3), 4, 30, crossed=False)
    weight = np.random.default_rng(4).integers(1, 9, diff.shape).astype(float)
    interval = stats.two_way_interval(diff, weight, crossed=False)
    assert interval == stats.t_interval(diff.sum(axis=1) / weight.sum(axis=1))
    six = nested(np.random.default_rng(3), 6, 30, crossed=False)
    ones = np.ones_like(six)
    assert stats.two_way_interval(six, ones, crossed=False) == stats.hierarchical_bootstrap(six, ones, crossed=False)
    none = stats.two_way_interval(diff[:1], weight[:1], crossed=True)
    assert (none.low, none.note) == (None, "one seed has no standard deviation")


@pytest.mark.parametrize("seeds", [6, 8, 10])
def test_false_positives_are_as_many_as_the_level_and_no_more(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    studies = 20_000
    found = int((stats.sign_flip_ps(rng.normal(size=(seeds, studies))) <= 0.05).sum())
    level = 2 * np.floor(0.05 * 2 ** (seeds - 1)) / 2**seeds  # as far as the flips reach 5 %
    low, high = scipy_stats.binom.interval(0.999, studies, level)
    assert low <= found <= high
    assert level <= 0.05


@pytest.mark.parametrize("seeds", [6, 10])
def test_interval_over_seeds_and_examples_is_not_far_too_wide(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    studies, hits, weight = 400, 0, np.ones((seeds, 100))
    for _ in range(studies):
        diff = rng.normal(0, 0.15, (seeds, 1)) + rng.normal(0, 1.0, (1, 100)) + rng.normal(0, 0.5, (seeds, 100))
        interval = stats.hierarchical_bootstrap(diff, weight, crossed=True, draws=999)
        hits += interval.low <= 0 <= interval.high
    low, high = scipy_stats.binom.interval(0.999, studies, 0.95)
    assert low <= hits <= high


def nested(rng: np.random.Generator, seeds: int, examples: int, crossed: bool) -> np.ndarray:
    shared = rng.normal(0, 1, (1 if crossed else seeds, examples))
    return rng.normal(0, 0.15, (seeds, 1)) + shared + rng.normal(0, 0.5, (seeds, examples))


@pytest.mark.parametrize("crossed", [True, False])
def test_hierarchical_interval_covers_new_seeds_and_examples(crossed: bool) -> None:
    rng = np.random.default_rng(6)
    studies, hits = 250, 0
    weight = np.ones((8, 30))
    for _ in range(studies):
        diff = nested(rng, 8, 30, crossed)
        interval = stats.hierarchical_bootstrap(diff, weight, crossed=crossed, draws=300)
        hits += interval.low <= 0 <= interval.high
    assert hits >= scipy_stats.binom.ppf(0.001, studies, 0.95)  # errs on the wide side only


def test_shared_examples_must_be_drawn_together() -> None:
    diff = nested(np.random.default_rng(7), 8, 40, crossed=True)
    weight = np.ones_like(diff)
    together = stats.hierarchical_bootstrap(diff, weight, crossed=True)
    apart = stats.hierarchical_bootstrap(diff, weight, crossed=False)
    seeds_only = stats.bootstrap_interval(diff.mean(axis=1))
    assert together.high - together.low > 1.2 * (apart.high - apart.low)
    assert together.high - together.low > 1.2 * (seeds_only.high - seeds_only.low)


def test_hierarchical_interval_weighs_by_tokens_and_is_seeded() -> None:
    diff, weight = np.array([[0.0, 30.0]] * 6), np.array([[1.0, 30.0]] * 6)
    interval = stats.hierarchical_bootstrap(diff, weight, crossed=True)
    assert (interval.low, interval.high) == (0.0, 1.0)
    rng_diff = nested(np.random.default_rng(0), 6, 20, crossed=False)
    ones = np.ones_like(rng_diff)
    first = stats.hierarchical_bootstrap(rng_diff, ones, crossed=False, seed=1)
    assert first == stats.hierarchical_bootstrap(rng_diff, ones, crossed=False, seed=1)
    assert first != stats.hierarchical_bootstrap(rng_diff, ones, crossed=False, seed=2)


@pytest.mark.parametrize(
    ("count", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_table(count: int, number: int, low: float, high: float) -> None:
    interval = stats.wilson_interval(count / number, number)  # Newcombe 1998, table I, method 3
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_statsmodels_and_inverts_the_score_test(confidence: float) -> None:
    z = scipy_stats.norm.isf((1 - confidence) / 2)
    for number in (1, 2, 5, 30):
        for count in np.arange(0, number + 0.5, 0.5):  # ties count half
            interval = stats.wilson_interval(count / number, number, confidence=confidence)
            expected = proportion_confint(count, number, alpha=1 - confidence, method="wilson")
            assert (interval.low, interval.high) == (pytest.approx(expected[0], abs=1e-14), pytest.approx(expected[1]))
            assert 0 <= interval.low <= count / number <= interval.high <= 1
            for end in (interval.low, interval.high):
                gap = z * np.sqrt(end * (1 - end) / number)
                assert abs(count / number - end) == pytest.approx(gap, abs=1e-9)


def test_equivalence_agrees_with_statsmodels_and_needs_both_sides() -> None:
    diff = np.array([0.01, -0.02, 0.015, 0.0, -0.01, 0.02])
    expected, *_ = ttost_paired(diff, np.zeros(6), -0.03, 0.03)
    assert stats.equivalence_t_test(diff, 0.03) == pytest.approx(expected)
    assert stats.equivalence_test(diff, 0.03) == 1 / 64
    better = diff - 0.1
    assert stats.noninferiority_test(better, 0.03) == 1 / 64
    assert stats.equivalence_test(better, 0.03) == 1.0
    assert stats.noninferiority_test(diff + 0.1, 0.03) == 1.0


def test_power_agrees_with_statsmodels_and_cohens_table() -> None:
    for d, n, alpha in ((0.5, 34, 0.05), (1.2, 8, 0.01), (0.2, 60, 0.05)):
        expected = TTestPower().power(d, n, alpha)
        assert stats.paired_power(d, 1.0, n, alpha=alpha) == pytest.approx(expected, abs=1e-9)
    # G*Power 3.1 (Faul et al. 2007), paired t test, d_z = 0.5, two-sided 5 %, power 0.8: n = 34.
    assert stats.seeds_for_power(0.5, 1.0) == 34


def test_seeds_for_power_is_honest_at_the_ends() -> None:
    assert stats.seeds_for_power(100.0, 1.0) == 6  # fewer cannot reach 0.05 by sign flips
    assert stats.seeds_for_power(0.0, 1.0) is None
    assert stats.seeds_for_power(1e-4, 1.0) is None


def test_recommended_seeds_do_give_the_power_by_simulation() -> None:
    seeds = stats.seeds_for_power(0.9, 1.0)
    rows = np.random.default_rng(8).normal(0.9, 1.0, (400, seeds))
    found = np.mean([stats.sign_flip_test(row) <= 0.05 for row in rows])
    assert 0.72 <= found <= 0.9


def test_importing_stats_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, adaptive_lora.analysis.stats; print({'torch', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_symmetry_is_scipys_and_needs_eight_seeds() -> None:
    rng = np.random.default_rng(0)
    skewed = rng.exponential(size=40)
    assert stats.symmetry(skewed) == pytest.approx(float(scipy_stats.skewtest(skewed).pvalue))
    assert stats.symmetry(skewed) < 0.01 < stats.symmetry(np.concatenate([skewed, -skewed]))
    assert stats.symmetry(skewed[:7]) is None
    assert stats.symmetry(np.ones(9)) is None
