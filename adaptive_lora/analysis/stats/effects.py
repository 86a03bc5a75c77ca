"""Effect sizes: a difference against its noise over seeds, and the share of seeds won."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import optimize
from scipy import stats as distributions

from adaptive_lora.analysis.stats.arrays import Interval, sample
from adaptive_lora.analysis.stats.intervals import absent


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Difference in units of its own standard deviation over seeds."""

    d_z: float | None
    """Mean over standard deviation of the paired differences (Cohen 1988, section 2.3.5)."""
    interval: Interval
    superiority: float
    """Probability of superiority: share of seeds in which the method has the lower value, ties
    counted half (Grissom & Kim 2012, chapter 5)."""
    superiority_interval: Interval
    """Wilson's interval of a proportion (Wilson 1927), which few seeds leave wide."""


def paired_effect(diff_S: ArrayLike, *, confidence: float = 0.95) -> Effect:
    """Return the paired effect size d_z with its interval, and the share of seeds won.

    Answers: how large is the difference against its own noise over seeds, and so how hard is it
    to see? It grows when seeds agree, not when the difference matters. The interval turns round
    the noncentral t distribution (Cumming & Finch 2001) and supposes normal differences.
    """
    values_S = sample(diff_S)
    wins = float((values_S < 0).mean() + 0.5 * (values_S == 0).mean())
    share_interval = wilson_interval(wins, values_S.size, confidence=confidence)
    if (nothing := absent(values_S)) is not None:
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
