"""Sign-flip tests at several looks: seeds are added until a comparison is decided, at one error rate over all looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from adaptive_lora.analysis.stats.intervals import Interval
from adaptive_lora.analysis.stats.significance import EXACT_SEEDS, Alternative, FloatArray, attainable_p, sample

SPENDING_POWER = 2.0
"""Exponent of the spending function. 1 spends evenly and decides early; 3 is close to O'Brien and Fleming's."""


REPEATED = "repeated sign flips"
"""`Interval.method` of an interval that holds over all looks together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """Plan of a test that is repeated while seeds are added, and how far it has come."""

    most: int
    """Number of seeds at which the last look takes place."""
    planned: tuple[int, ...]
    """Number of seeds that are due at each look so far."""
    seeds: tuple[int, ...]
    """Number of those that there are; fewer where trials failed."""

    def __post_init__(self) -> None:
        """Refuse looks out of order, and more seeds than can be counted exactly."""
        rising = all(low < high for low, high in pairwise((0, *self.planned, self.most + 1)))
        kept = all(low <= high for low, high in pairwise((1, *self.seeds)))
        within = all(found <= due for found, due in zip(self.seeds, self.planned, strict=True))
        if not (self.planned and rising and kept and within) or self.most > EXACT_SEEDS:
            raise ValueError(f"required looks at rising numbers of seeds, at most {EXACT_SEEDS}, got {self}")

    def spent(self, look: int, alpha: float) -> float:
        """Return the error that may be spent up to a look: alpha * (seeds due / most)^2.

        Source: Kim & DeMets 1987, Biometrika 74, for the family of Lan & DeMets 1983, Biometrika 70.
        """
        return float(alpha * (self.planned[look] / self.most) ** SPENDING_POWER)

    @property
    def attainable_p(self) -> float:
        """Least two-sided p that any differences could have reached so far."""
        shares = [(due / self.most) ** SPENDING_POWER for due in self.planned]
        return float(min(1.0, *(attainable_p(n) / share for n, share in zip(self.seeds, shares, strict=True))))


def sequential_sign_flip(
    diff_S: ArrayLike, looks: Looks, *, alpha: float, alternative: Alternative = "two-sided"
) -> int | None:
    """Return the look at which "the differences lie symmetrically about 0" is rejected; None if at none so far.

    The sign flips of all seeds so far are one exact reference for all looks together: a flip of the first seeds says
    at which earlier look it would itself have been rejected. What may be spent up to a look, less what these
    flips have spent, is given to the most extreme of the others. So the chance of a false rejection at any look is
    at most alpha, for any spacing of the looks, and what few flips leave unspent is kept for later looks.

    Not to be believed where `sign_flip_test` is not, or if the looks' plan was chosen after seeing differences.

    Args:
        diff_S: differences in the order in which the seeds were added.
        looks: plan; its last look has all differences.
        alpha: error over all looks up to the most seeds.
        alternative: as for `sign_flip_test`.

    Source: Lan & DeMets 1983, Biometrika 70, on the reference set of Fisher 1935, section 21.
    """
    rejected = _rejected(sample(diff_S), looks, alpha, alternative)
    return next((look for look, now in enumerate(rejected) if now), None)


def _rejected(values_S: FloatArray, looks: Looks, alpha: float, alternative: Alternative) -> Iterator[bool]:
    """Yield for each look whether the observed signs are rejected there."""
    if values_S.size != looks.seeds[-1]:
        raise ValueError(f"required {looks.seeds[-1]} differences, as many as at the last look, got {values_S.size}")
    slack = 1e-12 * float(np.abs(values_S).sum())  # the same sum in another order is a tie
    sum_B, before_B = np.zeros(1), np.zeros(1, dtype=bool)
    for look, (first, last) in enumerate(zip((0, *looks.seeds), looks.seeds, strict=False)):
        for value in values_S[first:last]:
            sum_B = np.concatenate([sum_B + value, sum_B - value])
            before_B = np.tile(before_B, 2)
        stat_B = {"two-sided": np.abs(sum_B), "greater": sum_B, "less": -sum_B}[alternative]
        left = int(looks.spent(look, alpha) * sum_B.size + 1e-9) - int(before_B.sum())
        others_B = stat_B[~before_B]
        if left <= 0:
            yield False
            continue
        # More extreme than the first one that does not fit; ties with it do not fit either.
        bound = -np.inf if left >= others_B.size else np.partition(others_B, -left - 1)[-left - 1]
        now_B = stat_B > bound + slack
        yield bool(now_B[0])
        before_B |= now_B


def sequential_p(diff_S: ArrayLike, looks: Looks, *, alternative: Alternative = "two-sided") -> float:
    """Return the least alpha at which the sequential test rejects at some look so far; 1 if there is none.

    It is at most the true chance of such a result under the null hypothesis, whenever the study stopped.
    """
    values_S = sample(diff_S)

    def rejects(exponent: float) -> bool:
        return sequential_sign_flip(values_S, looks, alpha=2.0**exponent, alternative=alternative) is not None

    if not rejects(0.0):
        return 1.0
    low, high = -float(looks.most) - 1, 0.0
    while high - low > 1e-3:  # a relative error of 0.07 %, upwards
        middle = (low + high) / 2
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return float(2.0**high)


def repeated_interval(diff_S: ArrayLike, looks: Looks, *, confidence: float) -> Interval:
    """Return the interval of shifts that the last look does not reject; over all looks it covers as often as asked.

    Differences are taken to lie symmetrically about the shift. A look at which too few flips may be spent to reject
    anything has no interval.

    Source: Jennison & Turnbull 1989, Journal of the Royal Statistical Society B 51, repeated confidence intervals.
    """
    values_S = sample(diff_S)
    mean, reach = float(values_S.mean()), float(np.ptp(values_S))

    def rejected(shift: float) -> bool:
        return list(_rejected(values_S - shift, looks, 1 - confidence, "two-sided"))[-1]

    if reach == 0:
        return Interval.missing("all seeds gave the same difference")
    if not rejected(mean + reach) or not rejected(mean - reach):
        return Interval.missing(f"{values_S.size} seeds cannot reject any difference at this look")
    ends = []
    for way in (-1.0, 1.0):
        kept, out = 0.0, reach
        while out - kept > 1e-3 * reach:
            middle = (kept + out) / 2
            kept, out = (kept, middle) if rejected(mean + way * middle) else (middle, out)
        ends.append(mean + way * out)
    return Interval(low=ends[0], high=ends[1], method=REPEATED)
