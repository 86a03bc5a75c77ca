"""How large a difference is against its noise, and how many seeds it takes to see one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import optimize
from scipy import stats as distributions

from adaptive_lora.stats.arrays import Interval, no_spread, sample
from adaptive_lora.stats.significance import least_seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Difference in units of its own spread over seeds."""

    d_z: float | None
    """Mean over standard deviation of the paired differences (Cohen 1988, section 2.3.5)."""
    interval: Interval
    superiority: float
    """Share of seeds in which the method has the lower value, ties counted half."""


def paired_effect(diff_S: ArrayLike, *, confidence: float = 0.95) -> Effect:
    """Return the paired effect size d_z with its interval, and the share of seeds won.

    Answers: how large is the difference against its own noise over seeds, and so how hard is it
    to see? It grows when seeds agree, not when the difference matters. The interval turns round
    the noncentral t distribution (Cumming & Finch 2001) and supposes normal differences.
    """
    values_S = sample(diff_S)
    wins = float((values_S < 0).mean() + 0.5 * (values_S == 0).mean())
    if values_S.size < 2 or no_spread(values_S):
        nothing = Interval(low=None, high=None, method="none", note="no spread over seeds")
        return Effect(d_z=None, interval=nothing, superiority=wins)
    root = math.sqrt(values_S.size)
    d_z = float(values_S.mean() / values_S.std(ddof=1))
    t_value, freedom = d_z * root, values_S.size - 1

    def centre(probability: float) -> float:
        def excess(shift: float) -> float:
            return _noncentral_cdf(t_value, freedom, shift) - probability

        reach = 8 + 2 * abs(t_value)
        return float(optimize.brentq(excess, t_value - reach, t_value + reach))

    tail = (1 - confidence) / 2
    interval = Interval(
        low=centre(1 - tail) / root, high=centre(tail) / root, method="noncentral t"
    )
    return Effect(d_z=d_z, interval=interval, superiority=wins)


def _noncentral_cdf(t_value: float, freedom: int, shift: float) -> float:
    """Return P(T <= t); scipy gives NaN far out in the tails, where the answer is 0 or 1."""
    probability = float(distributions.nct.cdf(t_value, freedom, shift))
    if math.isnan(probability):
        return 0.0 if shift > t_value else 1.0
    return probability


def paired_power(difference: float, spread: float, seeds: int, *, alpha: float = 0.05) -> float:
    """Return the chance that a two-sided paired t test finds a true difference.

    Args:
        difference: true mean difference.
        spread: standard deviation of paired differences over seeds.
        seeds: paired seeds.
        alpha: level of the test, already divided for several methods.

    The sign-flip test has a little less, most at few seeds, where its p is coarse.
    """
    freedom = seeds - 1
    critical = float(distributions.t.isf(alpha / 2, freedom))
    shift = abs(difference) / spread * math.sqrt(seeds)
    return (
        1 - _noncentral_cdf(critical, freedom, shift) + _noncentral_cdf(-critical, freedom, shift)
    )


def seeds_for_power(
    difference: float, spread: float, *, alpha: float = 0.05, power: float = 0.8, most: int = 2_000
) -> int | None:
    """Return how many paired seeds find a true difference with the power asked for.

    None where more than `most` would be needed or the difference is 0. Never below the number at
    which the sign-flip test can reach alpha at all.

    Not to be believed to the digit: difference and spread from a few seeds are themselves rough,
    and power at the observed difference says nothing that its p did not (Hoenig & Heisey 2001);
    ask it about a difference that would matter, such as the equivalence margin.
    """
    least = max(2, least_seeds(alpha))
    if difference == 0 or spread <= 0:
        return None if difference == 0 else least
    if paired_power(difference, spread, most, alpha=alpha) < power:
        return None
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        if paired_power(difference, spread, middle, alpha=alpha) >= power:
            high = middle
        else:
            low = middle + 1
    return low
