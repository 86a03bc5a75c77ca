"""Do allocations agree? Rank correlations between vectors over the same sites."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from adaptive_lora.analysis.stats.arrays import all_equal


def rank_agreement(value_LK: ArrayLike) -> tuple[tuple[float | None, ...], ...]:
    """Return Spearman's rank correlation between every two of L vectors over K sites.

    1 on the diagonal; None where a vector is constant, such as uniform ranks, since nothing is
    ordered there. Ties share their mean rank (Spearman 1904; Kendall 1948, chapter 3).
    """
    rows = np.asarray(value_LK, dtype=np.float64)
    flat = [all_equal(row) for row in rows]
    matrix: list[list[float | None]] = [[None] * len(rows) for _ in rows]
    for one, other in itertools.combinations_with_replacement(range(len(rows)), 2):
        if flat[one] or flat[other]:
            continue
        value = 1.0 if one == other else float(distributions.spearmanr(rows[one], rows[other])[0])
        matrix[one][other] = matrix[other][one] = value
    return tuple(tuple(row) for row in matrix)
