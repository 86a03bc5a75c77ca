"""Methods beside their verdicts: cost against loss, the early rate, and the agreement of allocations."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from adaptive_lora.analysis.stats.significance import all_equal


def pareto_front(cost_M: ArrayLike, loss_M: ArrayLike) -> NDArray[np.bool_]:
    """Return which methods (M) are on the front.

    On it is a method of which no other costs at most as much, loses at most as much, and is better
    in one of both. Equal points all stay.
    """
    cost, loss = np.asarray(cost_M, dtype=np.float64), np.asarray(loss_M, dtype=np.float64)
    cheaper_MM, lower_MM = cost[:, None] <= cost, loss[:, None] <= loss
    strictly_MM = (cost[:, None] < cost) | (loss[:, None] < loss)
    return np.asarray(~(cheaper_MM & lower_MM & strictly_MM).any(axis=0))


def front_share(cost_SM: ArrayLike, loss_SM: ArrayLike, *, draws: int = 2_000, seed: int = 0) -> NDArray[np.float64]:
    """Return the share of bootstrap draws of seeds in which each method (M) is on the front.

    Answers: would the front look the same with other seeds? The same seeds are drawn for all
    methods, which share their noise.
    """
    cost, loss = np.asarray(cost_SM, dtype=np.float64), np.asarray(loss_SM, dtype=np.float64)
    drawn_BS = np.random.default_rng(seed).integers(0, len(cost), (draws, len(cost)))
    fronts = [pareto_front(cost[row].mean(axis=0), loss[row].mean(axis=0)) for row in drawn_BS]
    return np.asarray(np.mean(fronts, axis=0), dtype=np.float64)


def front_gain(parameters_K: ArrayLike, loss_K: ArrayLike, *, low: float, high: float, reference: float) -> float:
    """Return the mean gain over a reference loss along a front, over budgets from low to high.

    At a budget p a method's front holds the least loss among its points with at most p parameters;
    the gain reference - loss is averaged over log2(p), so that each doubling of the budget counts
    the same. Up to the normalisation by the range it is the hypervolume indicator (Zitzler &
    Thiele 1999) in (log2 parameters, loss) with reference point (high, reference).

    Raises:
        ValueError: an empty range, or no point at its lower end.
    """
    parameters = np.asarray(parameters_K, dtype=np.float64)
    loss = np.asarray(loss_K, dtype=np.float64)
    if not low < high or parameters.min() > low:
        raise ValueError(
            f"required low < high and a point at or under low; got low {low:g}, high {high:g}, "
            f"fewest parameters {parameters.min():g}"
        )
    inside = parameters[(parameters > low) & (parameters < high)]
    edge_P = np.concatenate([[low], np.unique(inside), [high]])
    gain_P = [reference - float(loss[parameters <= left].min()) for left in edge_P[:-1]]
    return float(np.dot(gain_P, np.diff(np.log2(edge_P))) / math.log2(high / low))


def first_reached(x_P: ArrayLike, loss_P: ArrayLike, target: float) -> float | None:
    """Return where a curve first comes down to a target, between its points by straight lines.

    Args:
        x_P: places of the curve's points (steps or tokens), rising.
        loss_P: losses there; those that are not finite do not reach anything.
        target: loss to reach.

    None where it is never reached: no number could say that.
    """
    places, losses = np.asarray(x_P, dtype=np.float64), np.asarray(loss_P, dtype=np.float64)
    below = np.flatnonzero(losses <= target)
    if not below.size:
        return None
    point = int(below[0])
    if point == 0 or not math.isfinite(losses[point - 1]):
        return float(places[point])
    share = (losses[point - 1] - target) / (losses[point - 1] - losses[point])
    return float(places[point - 1] + share * (places[point] - places[point - 1]))


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
