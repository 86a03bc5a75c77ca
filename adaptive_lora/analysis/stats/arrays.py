"""The check of a sample, and the interval, that all statistics share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval, or the reason why there is none."""

    low: float | None
    high: float | None
    method: str
    """Method by which it was made: `BCa`, `percentile`, `none` ..."""
    note: str = ""
    """Reason why it is missing, or why it says less than it seems to."""


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
