"""Bootstrap intervals over seeds, and over seeds and examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from adaptive_lora.stats.arrays import FloatArray, Interval, no_spread, sample
from adaptive_lora.stats.components import Components, variance_components
from adaptive_lora.stats.significance import attainable_p


def expanded_confidence(confidence: float, seeds: int) -> float:
    """Return the nominal confidence at which a bootstrap of few seeds covers as often as asked.

    The bootstrap divides by n where a variance needs n - 1, and knows no t distribution.

    Source: Hesterberg 2015, The American Statistician 69(4), "expanded percentile interval":
    tail = Phi(-sqrt(n / (n - 1)) t_{n-1}).
    """
    quantile = float(distributions.t.ppf((1 + confidence) / 2, seeds - 1))
    return 1 - 2 * float(distributions.norm.cdf(-math.sqrt(seeds / (seeds - 1)) * quantile))


def bootstrap_interval(
    values_S: ArrayLike, *, confidence: float = 0.95, draws: int = 9_999, seed: int = 0
) -> Interval:
    """Return an interval for the mean over seeds (of paired differences: pass the differences).

    Answers: where would the mean lie, were the study repeated with other seeds on the same
    examples? BCa (Efron 1987) at the expanded confidence of `expanded_confidence`; simulated
    coverage at 6, 8 and 10 normal seeds 93.6, 94.7 and 94.5 % (plain BCa: 85, 91, 91 %), at
    strongly skewed (exponential) ones 90.0, 92.1 and 92.5 %.

    Not to be believed below 6 seeds: no bootstrap interval leaves the range of the values, which
    holds the mean of a symmetric distribution in at most 1 - 2/2^n of studies; the note says so.
    """
    sample_S = sample(values_S)
    seeds = sample_S.size
    if seeds == 1:
        return Interval(low=None, high=None, method="none", note="one seed has no spread")
    note = _shortfall(seeds, confidence)
    if no_spread(sample_S):
        low, high = float(sample_S.min()), float(sample_S.max())
        note = "all seeds gave the same value"
        return Interval(low=low, high=high, method="percentile", note=note)
    level = expanded_confidence(confidence, seeds)
    method: Literal["BCa", "percentile"] = "BCa" if seeds >= 3 else "percentile"
    low, high = _scipy_bootstrap(sample_S, level, method, draws, seed)
    if not (math.isfinite(low) and math.isfinite(high)):
        method = "percentile"
        low, high = _scipy_bootstrap(sample_S, level, method, draws, seed)
    return Interval(low=low, high=high, method=method, note=note)


def _shortfall(seeds: int, confidence: float) -> str:
    reach = 1 - attainable_p(seeds)
    return f"{seeds} seeds: covers at most {reach:.1%}" if reach < confidence else ""


def _scipy_bootstrap(
    sample_S: FloatArray,
    level: float,
    method: Literal["BCa", "percentile"],
    draws: int,
    seed: int,
) -> tuple[float, float]:
    with warnings.catch_warnings():
        # A degenerate BCa is NaN, which the caller replaces by the percentile interval.
        warnings.simplefilter("ignore", category=distributions.DegenerateDataWarning)
        result = distributions.bootstrap(
            (sample_S,),
            np.mean,
            confidence_level=level,
            n_resamples=draws,
            method=method,
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def hierarchical_bootstrap(
    diff_SE: Sequence[ArrayLike],
    weight_SE: Sequence[ArrayLike],
    *,
    crossed: bool,
    confidence: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Return an interval for the mean over seeds of sum(diff) / sum(weight) over examples.

    Answers: where would the mean difference lie with other seeds and other examples of the same
    kind? `bootstrap_interval` keeps the examples and is narrower.

    Args:
        diff_SE: per seed, differences of summed loss per example.
        weight_SE: per seed, supervised tokens per example.
        crossed: all seeds saw the same examples in the same order: one draw of examples then
            serves all seeds (Owen 2007, the pigeonhole bootstrap). Otherwise examples are drawn
            afresh for each drawn seed (Davison & Hinkley 1997, section 3.8).
        confidence: of the interval, expanded for few seeds as in `bootstrap_interval`, less where
            the spread between examples prevails.
        draws: resamples.
        seed: of the resampling.

    Not to be believed with few examples or below 6 seeds. It errs on the wide side, since the
    spread between seeds already holds a part of the spread between examples.
    """
    diffs = [np.asarray(row, dtype=np.float64) for row in diff_SE]
    weights = [np.asarray(row, dtype=np.float64) for row in weight_SE]
    seeds = len(diffs)
    if seeds == 1:
        return Interval(low=None, high=None, method="none", note="one seed has no spread")
    if crossed:
        drawn_BS, count_BE = _crossed_draws(seeds, diffs[0].size, draws, seed)
        loss_BS = (count_BE @ np.stack(diffs).T) / (count_BE @ np.stack(weights).T)
        loss_BS = np.take_along_axis(loss_BS, drawn_BS, axis=1)
    else:
        rng = np.random.default_rng(seed)
        drawn_BS = rng.integers(0, seeds, (draws, seeds))
        loss_BS = np.empty((draws, seeds))
        for source, (diff_E, weight_E) in enumerate(zip(diffs, weights, strict=True)):
            drawn = drawn_BS == source
            picks = rng.integers(0, diff_E.size, (int(drawn.sum()), diff_E.size))
            loss_BS[drawn] = diff_E[picks].sum(axis=1) / weight_E[picks].sum(axis=1)
    level = expanded_confidence(confidence, seeds)
    parts = variance_components(diffs, weights, crossed=crossed)
    if parts is not None and parts.example > 0:
        level = _mixed_confidence(confidence, parts)
    influence = _left_out(diffs, weights, crossed=crossed)
    low, high = _bca(loss_BS.mean(axis=1), _ratio_mean(diffs, weights), influence, level)
    note = _shortfall(seeds, confidence)
    return Interval(low=low, high=high, method=f"{_design(crossed)} BCa", note=note)


def _design(crossed: bool) -> str:
    return "crossed" if crossed else "nested"


def _ratio_mean(diffs: Sequence[FloatArray], weights: Sequence[FloatArray]) -> float:
    """Return the mean over seeds of sum(diff) / sum(weight)."""
    return float(np.mean([d.sum() / w.sum() for d, w in zip(diffs, weights, strict=True)]))


def _left_out(
    diffs: Sequence[FloatArray], weights: Sequence[FloatArray], *, crossed: bool
) -> list[FloatArray]:
    """Return the estimate without each seed, and (where seeds share them) without each example."""
    loss_S = np.array([d.sum() / w.sum() for d, w in zip(diffs, weights, strict=True)])
    without_seed_S = (loss_S.sum() - loss_S) / (loss_S.size - 1)
    if not crossed:
        return [without_seed_S]
    diff_SE, weight_SE = np.stack(diffs), np.stack(weights)
    rest_SE = weight_SE.sum(axis=1, keepdims=True) - weight_SE
    if not (rest_SE > 0).all():  # one example holds all tokens of a seed
        return [without_seed_S]
    without_SE = (diff_SE.sum(axis=1, keepdims=True) - diff_SE) / rest_SE
    return [without_seed_S, without_SE.mean(axis=0)]


def _bca(
    draw_B: FloatArray, estimate: float, left_out: Sequence[FloatArray], level: float
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval of bootstrap draws.

    Source: Efron & Tibshirani 1993, section 14.3; with several samples the acceleration is that of
    scipy.stats.bootstrap: third over second moments of the jackknife, summed over the samples.
    """
    third = second = 0.0
    for values in left_out:
        pull = (values.size - 1) * (values.mean() - values)
        third += float((pull**3).sum()) / values.size**3
        second += float((pull**2).sum()) / values.size**2
    acceleration = third / (6 * second**1.5) if second > 0 else 0.0
    below = float((draw_B < estimate).mean() + 0.5 * (draw_B == estimate).mean())
    tail = (1 - level) / 2
    ends = np.array([tail, 1 - tail])
    if 0 < below < 1:
        bias = float(distributions.norm.ppf(below))
        shifted = bias + distributions.norm.ppf(np.clip(ends, 1e-12, 1 - 1e-12))
        ends = distributions.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(draw_B, ends)
    return float(low), float(high)


def _mixed_confidence(confidence: float, parts: Components) -> float:
    """Return the nominal confidence where few seeds and many examples both make the spread.

    As `expanded_confidence`, but only the seeds' part of the variance is taken to be short by
    (n - 1) / n, and the degrees of freedom are those of the sum of both parts (Satterthwaite 1946,
    Biometrics Bulletin 2): with few seeds and much spread between examples, t with n - 1 degrees
    would make the interval far too wide.
    """
    seeds, examples = parts.seeds, parts.examples
    by_seed = parts.spread(examples) ** 2 / seeds
    by_example = parts.example / examples
    total = by_seed + by_example
    freedom = total**2 / (by_seed**2 / (seeds - 1) + by_example**2 / (examples - 1))
    short = by_seed * (seeds - 1) / seeds + by_example * (examples - 1) / examples
    quantile = float(distributions.t.ppf((1 + confidence) / 2, freedom))
    return 1 - 2 * float(distributions.norm.cdf(-math.sqrt(total / short) * quantile))


@lru_cache(maxsize=1)  # every method of a comparison asks for the same ones
def _crossed_draws(
    seeds: int, examples: int, draws: int, seed: int
) -> tuple[NDArray[np.int64], FloatArray]:
    """Return drawn seeds (B, S), and how often each example is drawn (B, E)."""
    rng = np.random.default_rng(seed)
    drawn_BS = rng.integers(0, seeds, (draws, seeds))
    count_BE = rng.multinomial(examples, np.full(examples, 1 / examples), draws).astype(float)
    for array in (drawn_BS, count_BE):
        array.flags.writeable = False
    return drawn_BS, count_BE
