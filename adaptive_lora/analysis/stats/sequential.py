"""Sign-flip tests at several looks: seeds are added until a comparison is decided, at one error rate over all looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from adaptive_lora.analysis.stats.intervals import Interval
from adaptive_lora.analysis.stats.significance import EXACT_SEEDS, Alternative, FloatArray, attainable_p, sample

SPENDING_POWER = 2.0
"""Exponent of the spending function. 1 spends evenly and decides early; 3 is close to O'Brien and Fleming's."""
LEVELS = tuple(
    sorted({*(2.0 ** (-place / 16) for place in range(336)), *(0.05 / k for k in range(1, 65))}, reverse=True)
)
"""Values that a p over several looks takes, 4 % apart; among them 5 %, and Holm's shares of it for 64 comparisons."""
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
    values_S = sample(diff_S)
    rejected = _rejected(_flipped(values_S, looks, alternative), looks, alpha, alternative, slack=_slack(values_S))
    return next((look for look, now in enumerate(rejected) if now), None)


def _flipped(values_S: FloatArray, looks: Looks, alternative: Alternative) -> list[FloatArray]:
    """Return for each look the sums of the values so far under all sign flips; the first flip turns no sign.

    Two-sided, only those that keep the first sign: the others are the same up to their sign.
    """
    if values_S.size != looks.seeds[-1]:
        raise ValueError(f"required {looks.seeds[-1]} differences, as many as at the last look, got {values_S.size}")
    sum_B, found = np.zeros(1), []
    for first, last in pairwise((0, *looks.seeds)):
        for place in range(first, last):
            kept = alternative == "two-sided" and place == 0
            sum_B = np.concatenate([sum_B + values_S[place], *([] if kept else [sum_B - values_S[place]])])
        found.append(sum_B)
    return found


def _extremeness(sum_B: FloatArray, alternative: Alternative) -> FloatArray:
    """Return how much sums speak for the alternative."""
    if alternative == "two-sided":
        return np.abs(sum_B)
    return sum_B if alternative == "greater" else -sum_B


def _slack(values_S: FloatArray) -> float:
    """Return the distance up to which two sums are a tie: the same sum in another order differs by rounding."""
    return 1e-12 * float(np.abs(values_S).sum())


def _rejected(
    flipped: Sequence[FloatArray], looks: Looks, alpha: float, alternative: Alternative, *, slack: float
) -> Iterator[bool]:
    """Yield for each look whether the observed signs, those of the first flip, are rejected there.

    Args:
        flipped: sums of `_flipped`, by look.
        looks: plan of the looks.
        alpha: error over all looks.
        alternative: that of the sums.
        slack: distance up to which two sums are a tie.
    """
    each = 2 if alternative == "two-sided" else 1  # flips that a sum stands for
    before_B = np.zeros(1, dtype=bool)
    for look, sum_B in enumerate(flipped):
        before_B = np.tile(before_B, sum_B.size // before_B.size)
        stat_B = _extremeness(sum_B, alternative)
        others_B = stat_B[~before_B]
        left = int(looks.spent(look, alpha) * each * sum_B.size + 1e-9) // each - (sum_B.size - others_B.size)
        # More extreme than the first one that does not fit; ties with it do not fit either. Flips rejected before
        # cost nothing again, so that a look with nothing left still rejects the most extreme of those.
        bound = -np.inf if left >= others_B.size else np.partition(others_B, -left - 1)[-left - 1]
        now_B = stat_B > bound + slack
        yield bool(now_B[0])
        before_B |= now_B


def sequential_p(diff_S: ArrayLike, looks: Looks, *, alternative: Alternative = "two-sided") -> float:
    """Return p of the sequential test: the least of `LEVELS` such that it and all above it are rejected so far.

    It is at most the true chance of such a result under the null hypothesis, whenever the study stopped. Alpha
    between two levels is not asked, and all above must be rejected, since flips that an early look leaves unspent at
    one alpha and not at a larger one make a test that is not nested in alpha. With one look p is exact.
    """
    values_S = sample(diff_S)
    flipped, slack = _flipped(values_S, looks, alternative), _slack(values_S)
    if len(flipped) == 1:
        stat_B = _extremeness(flipped[0], alternative)
        return float(min(1.0, np.mean(stat_B >= stat_B[0] - slack) / looks.spent(0, 1.0)))
    p = 1.0
    for level in LEVELS:
        if not any(_rejected(flipped, looks, level, alternative, slack=slack)):
            break
        p = level
    return p


def repeated_interval(diff_S: ArrayLike, looks: Looks, *, confidence: float) -> Interval:
    """Return the interval of shifts that the last look does not reject; over all looks it covers as often as asked.

    Differences are taken to lie symmetrically about the shift. A look at which too few flips may be spent to reject
    anything has no interval.

    Source: Jennison & Turnbull 1989, Journal of the Royal Statistical Society B 51, repeated confidence intervals.
    """
    values_S = sample(diff_S)
    mean, reach = float(values_S.mean()), float(np.ptp(values_S))
    flipped, ones = (_flipped(one_S, looks, "two-sided") for one_S in (values_S, np.ones_like(values_S)))

    def rejected(shift: float) -> bool:
        moved = [sum_B - shift * ones_B for sum_B, ones_B in zip(flipped, ones, strict=True)]
        slack = _slack(values_S) + _slack(np.full(values_S.size, shift))
        return list(_rejected(moved, looks, 1 - confidence, "two-sided", slack=slack))[-1]

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
