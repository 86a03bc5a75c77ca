"""Variance between seeds and examples, and intervals for a mean over both, were both drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from adaptive_lora.analysis.stats.intervals import (
    STUDENT,
    Interval,
    absent,
    expanded_confidence,
    few_seeds,
    t_interval,
    t_quantile,
)
from adaptive_lora.analysis.stats.significance import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Variance components of a paired difference, in (nats per token)^2."""

    seed: float
    """Variance between seeds, on every example alike: only more seeds reduce it."""
    example: float
    """Variance between examples, under every seed alike: only more examples reduce it. Invisible to tests
    over seeds, which ask about the examples at hand."""
    residual: float
    """Variance of one example under one seed beyond both; reduced by seeds and by examples."""
    seeds: int
    examples: int
    """Test examples per seed."""

    def standard_deviation(self, examples: int) -> float:
        """Return the standard deviation over seeds of the difference on so many examples."""
        return math.sqrt(self.seed + self.residual / examples)


def variance_components(
    diff_SE: Sequence[ArrayLike], weight_SE: Sequence[ArrayLike], *, crossed: bool
) -> Components | None:
    """Estimate the components by analysis of variance; None below 2 seeds or 2 examples.

    The difference of a seed is sum(diff) / sum(weight); each example enters as its linearised
    share (diff - mean x weight) / mean weight, whose mean over examples is the seed's difference
    minus the overall one.

    Args:
        diff_SE: per seed, differences of summed loss per example.
        weight_SE: per seed, supervised tokens per example.
        crossed: all seeds saw the same examples in the same order. Otherwise the variance between
            examples cannot be told from the residual and is part of it.

    Not to be believed to the digit: a variance from 6 seeds is uncertain by a factor of 2 and
    more. Negative estimates become 0.

    Source: Searle, Casella & McCulloch 1992, Variance Components, sections 3.2 and 4.3.
    """
    diffs, weights = _rows(diff_SE), _rows(weight_SE)
    seeds, examples = len(diffs), min((row.size for row in diffs), default=0)
    if seeds < 2 or examples < 2:
        return None
    mean = _ratios(diffs, weights).mean()
    parts = [(d - mean * w) / w.mean() for d, w in zip(diffs, weights, strict=True)]
    mean_S = np.array([part_E.mean() for part_E in parts])
    between = float(mean_S.var(ddof=1))
    if not crossed:
        size = float(np.mean([part_E.size for part_E in parts]))
        within = float(np.mean([part_E.var(ddof=1) for part_E in parts]))
        return Components(
            seed=max(0.0, between - within / size), example=0.0, residual=within, seeds=seeds, examples=round(size)
        )
    part_SE = np.stack(parts)
    mean_E = part_SE.mean(axis=0)
    rest_SE = part_SE - mean_S[:, None] - mean_E + part_SE.mean()
    residual = float((rest_SE**2).sum() / ((seeds - 1) * (examples - 1)))
    return Components(
        seed=max(0.0, between - residual / examples),
        example=max(0.0, float(mean_E.var(ddof=1)) - residual / seeds),
        residual=residual,
        seeds=seeds,
        examples=examples,
    )


def two_way_interval(
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
    kind? `mean_interval` keeps the examples and is narrower. The margins of Student's t for few
    seeds (see `few_seeds`), `hierarchical_bootstrap` for more; the arguments are those of the
    latter.
    """
    diffs, weights = _rows(diff_SE), _rows(weight_SE)
    loss_S = _ratios(diffs, weights)
    if (nothing := absent(loss_S, loss_S.size)) is not None:
        return nothing
    if few_seeds(loss_S.size, confidence):
        return _t_margins(diffs, weights, crossed=crossed, confidence=confidence)
    return hierarchical_bootstrap(diffs, weights, crossed=crossed, confidence=confidence, draws=draws, seed=seed)


def _t_margins(
    diffs: Sequence[FloatArray], weights: Sequence[FloatArray], *, crossed: bool, confidence: float
) -> Interval:
    """Return the interval that adds the squared t margins of seeds and of examples.

    Each margin has its own degrees of freedom, so the interval is never narrower than that over
    seeds alone. It errs on the wide side, at 2 seeds much (simulated coverage 98 to 100 %). Where
    every seed has examples of its own, the variance between them is part of that between seeds.

    Source: Zou & Donner 2008, Statistics in Medicine 27, "method of variance estimates recovery".
    """
    loss_S = _ratios(diffs, weights)
    parts = variance_components(diffs, weights, crossed=crossed) if crossed else None
    if parts is None:
        return t_interval(loss_S, confidence=confidence)
    seeds, examples = parts.seeds, parts.examples
    seed_margin = t_quantile(confidence, seeds - 1) * parts.standard_deviation(examples) / math.sqrt(seeds)
    example_margin = t_quantile(confidence, examples - 1) * math.sqrt(parts.example / examples)
    half, mean = math.hypot(seed_margin, example_margin), float(loss_S.mean())
    return Interval(low=mean - half, high=mean + half, method=f"crossed {STUDENT}")


def _rows(array_SE: Sequence[ArrayLike]) -> list[FloatArray]:
    return [np.asarray(row, dtype=np.float64) for row in array_SE]


def _ratios(diffs: Sequence[FloatArray], weights: Sequence[FloatArray]) -> FloatArray:
    """Return sum(diff) / sum(weight) of every seed (S)."""
    return np.array([d.sum() / w.sum() for d, w in zip(diffs, weights, strict=True)])


def hierarchical_bootstrap(
    diff_SE: Sequence[ArrayLike],
    weight_SE: Sequence[ArrayLike],
    *,
    crossed: bool,
    confidence: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Return a bootstrap interval over seeds and examples; `two_way_interval` says of what.

    Args:
        diff_SE: per seed, differences of summed loss per example.
        weight_SE: per seed, supervised tokens per example.
        crossed: all seeds saw the same examples in the same order: one draw of examples then
            serves all seeds (Owen 2007, the pigeonhole bootstrap). Otherwise examples are drawn
            afresh for each drawn seed (Davison & Hinkley 1997, section 3.8).
        confidence: that of the interval, expanded for few seeds as in `bootstrap_interval`, less where
            the variance between examples prevails.
        draws: resamples.
        seed: seed of the resampling.

    Not to be believed with few examples or below 6 seeds; needs at least 2. It errs on the wide
    side, since the variance between seeds already holds a part of that between examples.
    """
    diffs, weights = _rows(diff_SE), _rows(weight_SE)
    seeds = len(diffs)
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
    estimate = float(_ratios(diffs, weights).mean())
    low, high = _bca(loss_BS.mean(axis=1), estimate, influence, level)
    return Interval(low=low, high=high, method="crossed BCa" if crossed else "nested BCa")


def _left_out(diffs: Sequence[FloatArray], weights: Sequence[FloatArray], *, crossed: bool) -> list[FloatArray]:
    """Return the estimate without each seed, and (where seeds share them) without each example."""
    loss_S = _ratios(diffs, weights)
    without_seed_S = (loss_S.sum() - loss_S) / (loss_S.size - 1)
    if not crossed:
        return [without_seed_S]
    diff_SE, weight_SE = np.stack(diffs), np.stack(weights)
    rest_SE = weight_SE.sum(axis=1, keepdims=True) - weight_SE
    if not (rest_SE > 0).all():  # one example holds all tokens of a seed
        return [without_seed_S]
    without_SE = (diff_SE.sum(axis=1, keepdims=True) - diff_SE) / rest_SE
    return [without_seed_S, without_SE.mean(axis=0)]


def _bca(draw_B: FloatArray, estimate: float, left_out: Sequence[FloatArray], level: float) -> tuple[float, float]:
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
    """Return the nominal confidence where few seeds and many examples both make the variance.

    As `expanded_confidence`, but only the seeds' part of the variance is taken to be short by
    (n - 1) / n, and the degrees of freedom are those of the sum of both parts (Satterthwaite 1946,
    Biometrics Bulletin 2): with few seeds and much variance between examples, t with n - 1 degrees
    would make the interval far too wide.
    """
    seeds, examples = parts.seeds, parts.examples
    by_seed = parts.standard_deviation(examples) ** 2 / seeds
    by_example = parts.example / examples
    total = by_seed + by_example
    freedom = total**2 / (by_seed**2 / (seeds - 1) + by_example**2 / (examples - 1))
    short = by_seed * (seeds - 1) / seeds + by_example * (examples - 1) / examples
    quantile = float(distributions.t.ppf((1 + confidence) / 2, freedom))
    return 1 - 2 * float(distributions.norm.cdf(-math.sqrt(total / short) * quantile))


@lru_cache(maxsize=1)  # every method of a comparison asks for the same ones
def _crossed_draws(seeds: int, examples: int, draws: int, seed: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Return drawn seeds (B, S), and how often each example is drawn (B, E)."""
    rng = np.random.default_rng(seed)
    drawn_BS = rng.integers(0, seeds, (draws, seeds))
    count_BE = rng.multinomial(examples, np.full(examples, 1 / examples), draws).astype(float)
    for array in (drawn_BS, count_BE):
        array.flags.writeable = False
    return drawn_BS, count_BE
