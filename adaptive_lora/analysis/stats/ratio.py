"""A ratio of two means over the same seeds, with its interval."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from adaptive_lora.analysis.stats.intervals import Interval, absent, t_quantile
from adaptive_lora.analysis.stats.significance import sample

FIELLER = "Fieller's theorem"
"""`Interval.method` of the interval of a ratio."""


def ratio_of_means(
    upper_S: ArrayLike, lower_S: ArrayLike, *, confidence: float = 0.95
) -> tuple[float | None, Interval]:
    """Return the ratio of two means over paired seeds, and its interval by Fieller's theorem.

    The interval holds every ratio R at which a t test does not reject that the mean of upper - R lower is 0: exact
    where pairs are normal, at any number of seeds, however near to 0 the lower mean is. Where that mean cannot be told
    from 0, ratios have no bounds and there is no interval; where it is 0, there is no ratio.

    Source: Fieller 1954, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16(2).
    """
    above_S, below_S = sample(upper_S), sample(lower_S)
    above, below, seeds = float(above_S.mean()), float(below_S.mean()), above_S.size
    if below == 0:
        return None, Interval.missing("what it is a share of is 0")
    ratio = above / below
    if (nothing := absent(above_S - ratio * below_S, seeds)) is not None:
        return ratio, nothing
    factor = t_quantile(confidence, seeds - 1) ** 2 / seeds
    (spread_a, both), (_, spread_b) = (factor * np.cov(above_S, below_S)).tolist()
    if below**2 <= spread_b:
        return ratio, Interval.missing("what it is a share of cannot be told from 0")
    middle, scale = above * below - both, below**2 - spread_b
    half = math.sqrt(max(0.0, middle**2 - scale * (above**2 - spread_a)))
    return ratio, Interval(low=(middle - half) / scale, high=(middle + half) / scale, method=FIELLER)
