"""Methods beside their verdicts: cost against loss, the early rate, and the agreement of allocations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from adaptive_lora.analysis.stats.significance import FloatArray, all_equal

_TOGETHER = 2**20
"""Values of drawn seeds that are in memory together."""


def pareto_front(cost_M: ArrayLike, loss_M: ArrayLike) -> NDArray[np.bool_]:
    """Return which methods (M) are on the front.

    On it is a method of which no other costs at most as much, loses at most as much, and is better
    in one of both. Equal points all stay.
    """
    cost, loss = np.asarray(cost_M, dtype=np.float64), np.asarray(loss_M, dtype=np.float64)
    return np.asarray(_fronts(cost[None], loss[None])[0], dtype=np.bool_)


def _fronts(cost_BM: FloatArray, loss_BM: FloatArray) -> NDArray[np.bool_]:
    """Return which methods are on the front of each draw (B, M)."""
    order_BM = np.lexsort((loss_BM, cost_BM))  # by cost, then by loss
    cost_BM, loss_BM = (np.take_along_axis(values, order_BM, axis=1) for values in (cost_BM, loss_BM))
    before_BM = np.minimum.accumulate(loss_BM, axis=1)
    on_BM = np.ones(cost_BM.shape, dtype=bool)
    on_BM[:, 1:] = loss_BM[:, 1:] < before_BM[:, :-1]
    for place in range(1, cost_BM.shape[1]):  # the equal of a point on the front
        same_B = (cost_BM[:, place] == cost_BM[:, place - 1]) & (loss_BM[:, place] == loss_BM[:, place - 1])
        on_BM[:, place] |= same_B & on_BM[:, place - 1]
    found_BM = np.empty_like(on_BM)
    np.put_along_axis(found_BM, order_BM, on_BM, axis=1)
    return found_BM


def front_share(cost_SM: ArrayLike, loss_SM: ArrayLike, *, draws: int = 2_000, seed: int = 0) -> NDArray[np.float64]:
    """Return the share of bootstrap draws of seeds in which each method (M) is on the front.

    Answers: would the front look the same with other seeds? The same seeds are drawn for all
    methods, which share their noise.
    """
    cost_SM, loss_SM = (np.asarray(values, dtype=np.float64) for values in (cost_SM, loss_SM))
    seeds, methods = cost_SM.shape
    drawn_BS = np.random.default_rng(seed).integers(0, seeds, (draws, seeds))
    counts_M, part = np.zeros(methods), max(1, _TOGETHER // (seeds * methods))
    for start in range(0, draws, part):
        rows = drawn_BS[start : start + part]
        counts_M += _fronts(cost_SM[rows].mean(axis=1), loss_SM[rows].mean(axis=1)).sum(axis=0)
    return counts_M / draws


def front_gain(parameters_K: ArrayLike, loss_K: ArrayLike, *, low: float, high: float, reference: float) -> FloatArray:
    """Return the mean gain over a reference loss along a front, over budgets from low to high.

    Rows of losses, such as those of bootstrap draws, give one gain each.

    At a budget p a method's front holds the least loss among its points with at most p parameters;
    the gain reference - loss is averaged over log2(p), so that each doubling of the budget counts
    the same. Up to the normalisation by the range it is the hypervolume indicator (Zitzler &
    Thiele 1999) in (log2 parameters, loss) with reference point (high, reference).

    Raises:
        ValueError: an empty range, or no point at its lower end.
    """
    parameters, loss = np.asarray(parameters_K, dtype=np.float64), np.asarray(loss_K, dtype=np.float64)
    if not low < high or parameters.min() > low:
        raise ValueError(
            f"required low < high and a point at or under low; got low {low:g}, high {high:g}, "
            f"fewest parameters {parameters.min():g}"
        )
    order = np.argsort(parameters, kind="stable")
    least = np.minimum.accumulate(loss[..., order], axis=-1)
    inside = parameters[(parameters > low) & (parameters < high)]
    edge_P = np.concatenate([[low], np.unique(inside), [high]])
    held_P = np.searchsorted(parameters[order], edge_P[:-1], side="right") - 1  # last point with at most so many
    gain = (reference - least[..., held_P]) @ np.diff(np.log2(edge_P)) / math.log2(high / low)
    return np.asarray(gain, dtype=np.float64)


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
    unit_LK = _ordered(value_LK)
    matrix_LL = np.clip(unit_LK @ unit_LK.T, -1.0, 1.0)
    np.fill_diagonal(matrix_LL, 1.0)
    ordered = [bool(row.any()) for row in unit_LK]
    return tuple(
        tuple(float(value) if one and other else None for value, other in zip(row, ordered, strict=True))
        for row, one in zip(matrix_LL, ordered, strict=True)
    )


def mean_agreement(value_LK: ArrayLike) -> float | None:
    """Return the mean of `rank_agreement` off its diagonal, in time linear in L; None where it has no such value."""
    unit_LK = _ordered(value_LK)
    number = int(unit_LK.any(axis=1).sum())
    if number < 2:
        return None
    # Every vector has length 1, so the squared length of the sum is L and twice the correlations of all pairs.
    return float((unit_LK.sum(axis=0) ** 2).sum() - number) / (number * (number - 1))


def _ordered(value_LK: ArrayLike) -> FloatArray:
    """Return the ranks of each vector, centred and of length 1; zeros for a constant vector."""
    rows_LK = np.asarray(value_LK, dtype=np.float64)
    rank_LK = distributions.rankdata(rows_LK, axis=1)
    rank_LK[[all_equal(row) for row in rows_LK]] = 0.0
    rank_LK -= rank_LK.mean(axis=1, keepdims=True)
    length_L = np.sqrt((rank_LK**2).sum(axis=1, keepdims=True))
    return np.asarray(rank_LK / np.where(length_L == 0, 1.0, length_L), dtype=np.float64)
