"""Tests over paired seeds, and their correction for several methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

FloatArray = NDArray[np.float64]
Alternative = Literal["two-sided", "less", "greater"]

EXACT_SEEDS = 20
"""All 2^n sign flips are counted up to this many seeds (8 MiB of sums), drawn at random above."""
MANY = 256
"""Number of values, such as those of test examples, above which flips are drawn in parts, to spare memory."""


def sample(values: ArrayLike) -> FloatArray:
    """Return values as one axis of finite floats.

    Raises:
        ValueError: empty, of several axes, or not finite: a failed seed must be left out by name.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"required at least one finite value along one axis, got shape {array.shape}: {array!r:.80}")
    return array


def all_equal(values_S: FloatArray) -> bool:
    """Tell whether all values are equal up to rounding; then no t statistic exists."""
    return bool(np.ptp(values_S) <= 1e-12 * max(1e-300, float(np.abs(values_S).max())))


def attainable_p(seeds: int) -> float:
    """Return the least two-sided p that any result over so many paired seeds can reach.

    The sign-flip test counts 2^n sign patterns of which at least two (all as observed, all
    turned) are as extreme as the observed one: 2/2^n; 5 seeds 0.0625, 6 seeds 0.03125. With tied
    or zero differences the true minimum is larger.
    """
    return math.ldexp(1.0, 1 - max(1, seeds))


def least_seeds(alpha: float) -> int:
    """Return the smallest number of seeds whose attainable p is at most alpha."""
    return max(1, math.ceil(1 - math.log2(alpha)))


def sign_flip_test(
    diff_S: ArrayLike, *, alternative: Alternative = "two-sided", draws: int = 99_999, seed: int = 0
) -> float:
    """Return the p-value of "the differences lie symmetrically about 0", by flipping signs.

    Answers: if method and baseline were interchangeable in every seed, how often would the mean
    difference be at least this far from 0? Counted over all 2^n flips up to `EXACT_SEEDS` seeds, and for
    any number of values of one size, as scores of 0 and 1 have: then it is McNemar's exact test. Otherwise
    over `draws` random flips with the observed one added (Phipson & Smyth 2010).

    Not to be believed where differences are strongly skewed, where seeds are not independent, or
    where seeds were added until the result pleased.

    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    values_S = sample(diff_S)
    observed, extra, share_B = float(values_S.sum()), 0, None
    if values_S.size > MANY:
        sum_B, share_B = _many_flips(values_S, draws, seed)
        extra = int(share_B is None)
    elif values_S.size <= EXACT_SEEDS:
        sum_B = np.zeros(1)
        for value in values_S:
            sum_B = np.concatenate([sum_B + value, sum_B - value])
    else:
        sum_B, extra = _random_signs(draws, values_S.size, seed) @ values_S, 1
    slack = 1e-12 * float(np.abs(values_S).sum())  # the same sum in another order is a tie
    if alternative == "two-sided":
        extreme_B = np.abs(sum_B) >= abs(observed) - slack
    elif alternative == "less":
        extreme_B = sum_B <= observed + slack
    else:
        extreme_B = sum_B >= observed - slack
    if share_B is not None:
        return min(1.0, float(share_B[extreme_B].sum()))
    return (int(extreme_B.sum()) + extra) / (sum_B.size + extra)


@lru_cache(maxsize=1)  # every method of a comparison asks for the same ones
def _random_signs(draws: int, seeds: int, seed: int) -> NDArray[np.int8]:
    """Return sign patterns (B, S)."""
    signs_BS = (np.random.default_rng(seed).integers(0, 2, (draws, seeds)) * 2 - 1).astype(np.int8)
    signs_BS.flags.writeable = False
    return signs_BS


def _many_flips(values_S: FloatArray, draws: int, seed: int) -> tuple[FloatArray, FloatArray | None]:
    """Return sums of randomly flipped values, or every sum with its probability where all have one size.

    Of values of one size only the number of positive signs matters, which is binomial.
    """
    size_V, count_V = np.unique(np.abs(values_S[values_S != 0]), return_counts=True)
    if size_V.size < 2:
        size, count = (float(size_V[0]), int(count_V[0])) if size_V.size else (0.0, 0)
        positive_B = np.arange(count + 1)
        return sample(size * (2.0 * positive_B - count)), distributions.binom.pmf(positive_B, count, 0.5)
    rng = np.random.default_rng(seed)
    sum_B = np.zeros(draws)
    for size, count in zip(size_V[count_V > 1], count_V[count_V > 1], strict=True):
        sum_B += size * (2.0 * rng.binomial(count, 0.5, draws) - count)
    single_V = size_V[count_V == 1]
    for start in range(0, single_V.size, 64):
        part_V = single_V[start : start + 64]
        signs_BV = rng.integers(0, 2, (draws, part_V.size), dtype=np.int8)
        sum_B += 2 * (signs_BV @ part_V) - part_V.sum()
    return sum_B, None


def step_down_max_t(diff_SM: ArrayLike, *, draws: int = 20_000, seed: int = 0) -> FloatArray:
    """Return p-values (M) adjusted for several methods by flipping all methods of a seed together.

    Answers the question of `holm` with more power: methods share the baseline, so their
    differences rise and fall together, and the flips keep that. Its least p is 2/2^n whatever
    the number of methods, where Holm's is M times that. Exact up to 14 seeds.

    A seed that a method lacks enters as 0: no flip changes its sum, and the statistic |sum| over
    the root of summed squares has variance 1 under flips whatever the number of seeds.

    Not to be believed where `sign_flip_test` is not.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing, algorithm 4.1.
    """
    values_SM = np.asarray(diff_SM, dtype=np.float64)
    seeds = values_SM.shape[0]
    rng = np.random.default_rng(seed)
    if seeds <= 14:
        codes_B = np.arange(2**seeds)
        sum_BM = (1 - 2 * ((codes_B[:, None] >> np.arange(seeds)) & 1)) @ values_SM
    elif seeds <= MANY:
        signs_BS = rng.integers(0, 2, (draws, seeds)) * 2 - 1
        signs_BS[0] = 1  # the observed pattern is one of the draws
        sum_BM = signs_BS @ values_SM
    else:
        sum_BM = np.zeros((draws, values_SM.shape[1]))
        for start in range(0, seeds, MANY):
            part_SM = values_SM[start : start + MANY]
            own_M = part_SM.any(axis=0)  # methods that have one of these values
            signs_BS = rng.integers(0, 2, (draws, len(part_SM)), dtype=np.int8)
            signs_BS[0] = 1
            sum_BM[:, own_M] += 2 * (signs_BS @ part_SM[:, own_M]) - part_SM[:, own_M].sum(axis=0)
    # Rises with |t| for a given number of seeds, and its denominator does not change under flips.
    scale_M = np.sqrt((values_SM**2).sum(axis=0))
    scale_M[scale_M == 0] = 1.0
    stat_BM = np.abs(sum_BM) / scale_M
    observed_M = np.abs(values_SM.sum(axis=0)) / scale_M
    order = np.argsort(-observed_M)
    # Of each method and of those after it, which is what the step down to it leaves.
    highest_BM = np.maximum.accumulate(stat_BM[:, order[::-1]], axis=1)[:, ::-1]
    p_M = np.empty(values_SM.shape[1])
    p_M[order] = np.maximum.accumulate((highest_BM >= observed_M[order] - 1e-12).mean(axis=0))
    return p_M


def holm(p_M: ArrayLike) -> FloatArray:
    """Return p-values (M) that hold for all methods together, in the order given.

    Answers: is this method still convincing, given that M methods had a chance to look good? The
    chance of even one false "different" stays at alpha under any dependence. It can be too
    strict: the smallest is multiplied by M, so its own least value is M x 2/2^n.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    values_M = sample(p_M)
    order = np.argsort(values_M)
    factors = np.arange(values_M.size, 0, -1)
    adjusted_M = np.empty_like(values_M)
    adjusted_M[order] = np.minimum(1.0, np.maximum.accumulate(factors * values_M[order]))
    return adjusted_M


def benjamini_hochberg(p_M: ArrayLike) -> FloatArray:
    """Return p-values (M) that bound the share of false findings instead of the chance of one.

    For screening many methods; a claim about a single one needs `holm`.

    Source: Benjamini & Hochberg 1995, Journal of the Royal Statistical Society B 57.
    """
    return np.asarray(distributions.false_discovery_control(sample(p_M), method="bh"))


def paired_t(diff_S: ArrayLike) -> float | None:
    """Return the two-sided p of Student's paired t test, or None where all differences are equal.

    Compared with `sign_flip_test`: more power where differences are normal, wrong where they are not,
    and able to be far below what the seeds support.
    """
    return _p_value(distributions.ttest_1samp, diff_S, least=2, popmean=0.0)


def wilcoxon(diff_S: ArrayLike) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test, or None if all differences are 0.

    Compared with `sign_flip_test`: uses ranks only, so that one wild seed cannot decide; asks about the
    median under symmetry. Source: Wilcoxon 1945; exact for few seeds.
    """
    values_S = sample(diff_S)
    if not values_S.any():
        return None
    return float(distributions.wilcoxon(values_S).pvalue)


def normality(diff_S: ArrayLike) -> float | None:
    """Return the p of Shapiro and Wilk's test that differences are normal; None below 3 seeds.

    A small value speaks against `paired_t`; a large one says little with few seeds. None above 5,000
    values too, for which its p is not known (Royston 1995).
    """
    return None if np.size(diff_S) > 5_000 else _p_value(distributions.shapiro, diff_S, least=3)


def symmetry(diff_S: ArrayLike) -> float | None:
    """Return the p of D'Agostino's test that differences are not skewed; None below 8 seeds.

    A small value speaks against `wilcoxon` and against reading `sign_flip_test` as one about the
    mean. Below 8 seeds no such test can tell. Source: D'Agostino 1970, Biometrika 57.
    """
    return _p_value(distributions.skewtest, diff_S, least=8)


def _p_value(test: Callable[..., Any], diff_S: ArrayLike, *, least: int, **options: Any) -> float | None:
    """Return the p of scipy's test; None below its least number of seeds, or where all differences are equal."""
    values_S = sample(diff_S)
    return None if values_S.size < least or all_equal(values_S) else float(test(values_S, **options).pvalue)


def noninferiority_test(diff_S: ArrayLike, margin: float) -> float:
    """Return the p of "worse by at least the margin" against "worse by less", by sign flips.

    Answers: is the loss given up, if any, smaller than what was declared to matter? Its least
    value is 1/2^n. Not to be believed if the margin was chosen after seeing the differences.
    """
    return sign_flip_test(sample(diff_S) - margin, alternative="less")


def equivalence_test(diff_S: ArrayLike, margin: float) -> float:
    """Return the p of "differs by at least the margin" against "differs by less" (TOST).

    Two one-sided tests, the larger p of both, by sign flips: least value 1/2^n, so 5 seeds reach
    0.05. `equivalence_t_test` is its counterpart for normal differences. Not to be believed if the
    margin was chosen after seeing the differences. Source: Schuirmann 1987; Lakens 2017.
    """
    values_S = sample(diff_S)
    lower = sign_flip_test(values_S + margin, alternative="greater")
    return max(lower, noninferiority_test(values_S, margin))


def equivalence_t_test(diff_S: ArrayLike, margin: float) -> float | None:
    """Return the p of two one-sided t tests against the margin, or None where all differences are equal."""
    lower = _p_value(distributions.ttest_1samp, diff_S, least=2, popmean=-margin, alternative="greater")
    upper = _p_value(distributions.ttest_1samp, diff_S, least=2, popmean=margin, alternative="less")
    return None if lower is None or upper is None else max(lower, upper)
