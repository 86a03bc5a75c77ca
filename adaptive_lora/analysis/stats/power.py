"""Effect sizes, and power: seeds and examples that it takes to see a difference, before a study and after it.

The paired t test gives the formula; `simulated_power` asks the sign-flip test and the correction
that really decide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize
from scipy import stats as distributions

from adaptive_lora.analysis.stats.intervals import Interval, absent
from adaptive_lora.analysis.stats.significance import FloatArray, benjamini_hochberg, holm, least_seeds, sample
from adaptive_lora.analysis.stats.two_way import Components

Correction = Literal["holm", "max_t", "benjamini_hochberg"]
_SIMULATED = 60
"""Most seeds at which sign flips are simulated; beyond, they and Student's t agree."""
_ROWS = 128
"""Sign patterns whose sums are in memory together."""
_EXACT, _FLIPS = 11, 1_023
"""All sign patterns up to so many seeds; above, so many random ones, enough for a share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Difference in units of its own standard deviation over seeds."""

    d_z: float | None
    """Mean over standard deviation of the paired differences (Cohen 1988, section 2.3.5)."""
    interval: Interval
    superiority: float
    """Probability of superiority: share of seeds in which the method has the better value, ties
    counted half (Grissom & Kim 2012, chapter 5)."""
    superiority_interval: Interval
    """Wilson's interval of a proportion (Wilson 1927), which few seeds leave wide."""


def paired_effect(
    diff_S: ArrayLike, *, confidence: float = 0.95, higher_is_better: bool = False, over: str = "seed"
) -> Effect:
    """Return the paired effect size d_z with its interval, and the share of seeds won.

    Answers: how large is the difference against its own noise over seeds, and so how hard is it
    to see? It grows when seeds agree, not when the difference matters. The interval turns round
    the noncentral t distribution (Cumming & Finch 2001) and supposes normal differences.
    `over` names what the differences are of: `seed` or `example`.
    """
    values_S = sample(diff_S)
    won_S = values_S > 0 if higher_is_better else values_S < 0
    wins = float(won_S.mean() + 0.5 * (values_S == 0).mean())
    share_interval = wilson_interval(wins, values_S.size, confidence=confidence)
    if (nothing := absent(values_S, values_S.size, over)) is not None:
        return Effect(d_z=None, interval=nothing, superiority=wins, superiority_interval=share_interval)
    root = math.sqrt(values_S.size)
    d_z = float(values_S.mean() / values_S.std(ddof=1))
    t_value, freedom = d_z * root, values_S.size - 1

    def centre(probability: float) -> float:
        def excess(shift: float) -> float:
            return noncentral_cdf(t_value, freedom, shift) - probability

        reach = 8 + 2 * abs(t_value)
        return float(optimize.brentq(excess, t_value - reach, t_value + reach))

    tail = (1 - confidence) / 2
    interval = Interval(low=centre(1 - tail) / root, high=centre(tail) / root, method="noncentral t")
    return Effect(d_z=d_z, interval=interval, superiority=wins, superiority_interval=share_interval)


def wilson_interval(share: float, number: int, *, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion.

    The ends are the true shares q that a score test does not reject, |share - q| <= z sqrt(q (1 - q) / n):
    (share + z^2/2n -+ z sqrt(share (1 - share)/n + z^2/4n^2)) / (1 + z^2/n), z the normal quantile.

    Source: Wilson 1927, Journal of the American Statistical Association 22; Newcombe 1998,
    Statistics in Medicine 17, method 3.

    Args:
        share: observed proportion; ties may make its count a half.
        number: observations.
        confidence: coverage of the interval.
    """
    z = float(distributions.norm.isf((1 - confidence) / 2))
    centre = share + z**2 / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    low, high = ((centre + end) / (1 + z**2 / number) for end in (-half, half))
    return Interval(low=max(0.0, low), high=min(1.0, high), method="Wilson")


def noncentral_cdf(t_value: float, freedom: int, shift: float) -> float:
    """Return P(T <= t); scipy gives NaN far out in the tails, where the answer is 0 or 1."""
    probability = float(distributions.nct.cdf(t_value, freedom, shift))
    if math.isnan(probability):
        return 0.0 if shift > t_value else 1.0
    return probability


def fewest_seeds(alpha: float, *, comparisons: int, correction: Correction) -> int:
    """Return the fewest paired seeds at which a corrected sign-flip p can reach alpha at all.

    Only Holm raises the least p: max-T's does not depend on the number of methods, and that of
    Benjamini and Hochberg stays where all methods reach it.
    """
    return least_seeds(alpha / max(1, comparisons) if correction == "holm" else alpha)


def paired_power(difference: float, sd: float, seeds: int, *, alpha: float = 0.05) -> float:
    """Return the chance that a two-sided paired t test finds a true difference.

    Args:
        difference: true mean difference.
        sd: standard deviation of paired differences over seeds.
        seeds: paired seeds.
        alpha: level of the test, already divided for several methods.

    The sign-flip test has a little less, most at few seeds, where its p is coarse, and none at all
    below `fewest_seeds`.
    """
    freedom = seeds - 1
    critical = float(distributions.t.isf(alpha / 2, freedom))
    shift = abs(difference) / sd * math.sqrt(seeds)
    return 1 - noncentral_cdf(critical, freedom, shift) + noncentral_cdf(-critical, freedom, shift)


def seeds_for_power(
    difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8, most: int = 2_000
) -> int | None:
    """Return how many paired seeds find a true difference with the power asked for.

    None where more than `most` would be needed or the difference is 0. Never below the number at
    which the sign-flip test can reach alpha at all.

    Not to be believed to the digit: difference and deviation from a few seeds are themselves rough,
    and power at the observed difference says nothing that its p did not (Hoenig & Heisey 2001);
    ask it about a difference that would matter, such as the equivalence margin.
    """
    least = max(2, least_seeds(alpha))
    if difference == 0 or sd <= 0:
        return None if difference == 0 else least
    if paired_power(difference, sd, most, alpha=alpha) < power:
        return None
    return least + bisect_left(
        range(least, most), power, key=lambda seeds: paired_power(difference, sd, seeds, alpha=alpha)
    )


def examples_for_power(
    difference: float, components: Components, seeds: int, *, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Return how many test examples find a true difference at this number of seeds.

    More examples shrink the noise of single examples within a seed, never what differs between
    seeds on every example. None where that alone is too much, or where so few seeds cannot reach
    alpha by sign flips.
    """
    if seeds < max(2, least_seeds(alpha)) or difference == 0:
        return None

    def lacking(log_sd: float) -> float:
        return paired_power(difference, math.exp(log_sd), seeds, alpha=alpha) - power

    size = math.log(abs(difference))
    allowed = math.exp(float(optimize.brentq(lacking, size - 5, size + 5))) ** 2
    if allowed <= components.seed:
        return None
    return max(1, math.ceil(components.residual / (allowed - components.seed)))


def examples_for_new_examples(
    difference: float, components: Components, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return how many test examples a claim about other examples of their kind takes at least.

    That is with any number of seeds: they do not reduce the variance between examples, so
    n = example ((z_{1 - alpha/2} + z_power) / difference)^2.
    """
    reach = float(distributions.norm.isf(alpha / 2) + distributions.norm.ppf(power))
    return max(1, math.ceil(components.example * (reach / difference) ** 2))


def checked_seeds(
    difference: float,
    sd: float,
    *,
    comparisons: int = 1,
    correction: Correction = "holm",
    alpha: float = 0.05,
    power: float = 0.8,
    studies: int = 400,
) -> tuple[int | None, float | None]:
    """Return seeds that give the power in simulation too, and the simulated power there.

    Starts from the formula at alpha / comparisons, the strictest level that a correction sets, and
    looks in `simulated_power` whether it takes more seeds (two standard errors below the power
    still count as reached) or, by max-T, may do with fewer. Above `_SIMULATED` seeds, and where random
    flips are too few for the strictest level, as for more than 25 comparisons at 0.05, the formula stands
    alone and no simulated power is given.
    """
    strictest = alpha / max(1, comparisons)
    formula = seeds_for_power(difference, sd, alpha=strictest, power=power)
    if formula is None or formula > _SIMULATED or sd <= 0 or strictest * (_FLIPS + 1) < 2:
        return formula, None
    enough = power - 2 * math.sqrt(power * (1 - power) / studies)

    @cache
    def simulate(seeds: int) -> float:
        return simulated_power(
            difference, sd, seeds, comparisons=comparisons, correction=correction, alpha=alpha, studies=studies
        )

    seeds = formula
    while simulate(seeds) < enough and seeds <= _SIMULATED:
        seeds += max(1, seeds // 12)
    if correction == "max_t" and seeds == formula:
        low = seeds_for_power(difference, sd, alpha=alpha, power=power) or seeds
        seeds = low + bisect_left(range(low, seeds), power, key=simulate)
    return seeds, simulate(seeds)


def simulated_power(
    difference: float,
    sd: float,
    seeds: int,
    *,
    comparisons: int = 1,
    correction: Correction = "holm",
    alpha: float = 0.05,
    studies: int = 1_000,
    seed: int = 0,
) -> float:
    """Return the share of made-up studies in which the corrected sign-flip test finds a method.

    Args:
        difference: true mean difference of that method; all others have none.
        sd: standard deviation of every method's paired differences over seeds. They correlate
            by one half, since all methods share the baseline's noise.
        seeds: paired seeds.
        comparisons: methods compared with the baseline.
        correction: that decides; of max-T the first step.
        alpha: level after correction.
        studies: made up; the standard error at 80 % is 0.4 / sqrt(studies).
        seed: seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, sd / math.sqrt(2), (seeds, studies, comparisons + 1))
    diff_SNM = noise[:, :, 1:] - noise[:, :, :1]
    diff_SNM[:, :, 0] += difference
    if correction == "max_t":
        return float(np.mean(_max_t_ps(diff_SNM, seed) <= alpha))
    adjust = holm if correction == "holm" else benjamini_hochberg
    p_NM = sign_flip_ps(diff_SNM.reshape(seeds, -1), seed=seed).reshape(studies, -1)
    return float(np.mean([adjust(p_M)[0] <= alpha for p_M in p_NM]))


def sign_flip_ps(diff_SN: FloatArray, *, seed: int = 0) -> FloatArray:
    """Return the two-sided `sign_flip_test` of many columns at once, shape (N)."""
    least_N = np.abs(diff_SN.sum(axis=0)) - 1e-12 * np.abs(diff_SN).sum(axis=0)
    return _flipped_share(diff_SN, least_N, seed)


def _max_t_ps(diff_SNM: FloatArray, seed: int) -> FloatArray:
    """Return per study (N) the first method's p of max-T's first step, over all methods."""
    seeds, studies, methods = diff_SNM.shape
    scale_NM = np.sqrt((diff_SNM**2).sum(axis=0))
    flat_SN = (diff_SNM / scale_NM).reshape(seeds, -1)
    least_N = np.abs(flat_SN.sum(axis=0)).reshape(studies, methods)[:, 0] - 1e-12
    return _flipped_share(flat_SN, least_N, seed)


def _flipped_share(value_SC: FloatArray, least_N: FloatArray, seed: int) -> FloatArray:
    """Return per study (N) the share of sign patterns under which a |sum| of its columns reaches the least one."""
    seeds, studies = len(value_SC), len(least_N)
    signs_BS, counts_N = _signs(seeds, seed), np.zeros(studies)
    for start in range(0, len(signs_BS), _ROWS):
        stat_BC = np.abs(signs_BS[start : start + _ROWS] @ value_SC)
        counts_N += (stat_BC.reshape(len(stat_BC), studies, -1).max(axis=2) >= least_N).sum(axis=0)
    return counts_N / len(signs_BS)


def _signs(seeds: int, seed: int) -> FloatArray:
    """Return sign patterns (B, S): all up to a mirror image, or random ones and the observed."""
    if seeds <= _EXACT:
        codes_B = np.arange(2 ** (seeds - 1))
        return np.asarray(1.0 - 2 * ((codes_B[:, None] >> np.arange(seeds)) & 1), dtype=np.float64)
    drawn_BS = np.random.default_rng(seed).integers(0, 2, (_FLIPS, seeds)) * 2.0 - 1
    return np.vstack([np.ones(seeds), drawn_BS])
