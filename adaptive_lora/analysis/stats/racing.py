"""Successive halving of one method's learning rates, pooled over its seeds.

At a *rung*, a validation pass on the way, the rates are put in order by their mean loss over seeds,
as the final choice puts them, and the worse ones are dropped (Jamieson & Talwalkar 2016,
1502.07943, with seeds pooled: all rates of a method learn from the same batches under one seed, so
their differences are paired).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.stats

RungLosses = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> validation loss at a rung; infinite or NaN where the trial failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceRule:
    """Rule for the learning rates of a method that continue; one for every method."""

    seeds: int | None
    """Seeds whose trials race, the lowest ones; the others are trained at the rates that are left.
    None: all seeds."""
    kept: tuple[float, ...]
    """Largest share of the rates that continues, for each rung; two rates may, whatever the share."""
    level: float
    """One-sided p of the paired t test over seeds at which a rate is clearly behind the best one;
    0: no test."""

    @property
    def text(self) -> str:
        """The rule in words."""
        who = "all seeds race" if self.seeds is None else f"the {self.seeds} lowest seeds race"
        shares = [
            f"at most {share:.0%} of the rates, or two, go on at rung {number}"
            for number, share in enumerate(self.kept, 1)
            if share < 1
        ]
        behind = f"none that is behind the best by a paired t test over seeds, p < {self.level:g}"
        return "; ".join(["rule: " + who, *shares, *([behind] if self.level else [])])

    def racing(self, seeds: tuple[int, ...]) -> tuple[int, ...]:
        """Return the seeds of a study whose trials race."""
        return tuple(sorted(seeds))[: self.seeds]

    def survivors(self, losses: RungLosses, rung: int) -> tuple[float, ...]:
        """Return the rates that continue after a rung, in order of size.

        Args:
            losses: those of the rates that came so far, each with the same seeds.
            rung: its number, from 0.
        """
        order = sorted(losses, key=lambda lr: standing(losses, lr))
        most = max(2, math.floor(len(order) * self.kept[rung]))
        best, *others = order[:most]
        return tuple(sorted([best, *(lr for lr in others if not self._behind(losses, lr, best))]))

    def _behind(self, losses: RungLosses, lr: float, best: float) -> bool:
        """Return whether a rate is clearly behind the best, by paired differences over seeds."""
        pairs = [(losses[lr][seed], losses[best][seed]) for seed in sorted(losses[best])]
        behind_S = np.array([own - other for own, other in pairs if math.isfinite(other)])
        if not len(behind_S) or not np.isfinite(behind_S).all():
            return True  # one of two that failed is enough, to fail in full and be told
        if len(behind_S) < 2 or not np.ptp(behind_S):
            return False
        test = scipy.stats.ttest_1samp(behind_S, 0.0, alternative="greater")
        return float(test.pvalue) < self.level


def standing(losses: RungLosses, lr: float) -> tuple[int, float, float]:
    """Return the key that orders rates, the best first: failed seeds, mean loss, rate.

    The final choice looks at the same: a rate cannot win by failing where it would do badly.
    """
    finite = [loss for loss in losses[lr].values() if math.isfinite(loss)]
    mean = float(np.mean(finite)) if finite else math.inf
    return len(losses[lr]) - len(finite), mean, lr


def nearest_passes(passes: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """Return the rungs: the validation passes nearest to one and to two thirds of a training.

    Args:
        passes: optimiser steps after which validation comes, in order; the last step is no rung.
        steps: optimiser steps of the whole training.
    """
    before = [step for step in passes if step < steps]
    if not before:
        return ()
    thirds = (steps / 3, 2 * steps / 3)
    return tuple(sorted({min(before, key=lambda step: abs(step - third)) for third in thirds}))


RACE_RULE = RaceRule(seeds=4, kept=(0.5, 1.0), level=0.01)
"""Rule of `--race`, chosen by replay on studies whose whole grid was trained (docs/racing.md)."""
