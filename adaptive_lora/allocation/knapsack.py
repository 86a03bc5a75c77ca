"""The knapsack of ranks under a parameter budget: greedy and exact solutions, and their distance from the bound.

The gains of a site's ranks do not increase, so its first ranks are always taken before later ones.
Items of equal cost differ in their gain alone, so a solution is a count per distinct cost: that many
items of the largest gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adaptive_lora.allocation.problem import AllocationProblem
from adaptive_lora.errors import AllocationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Spectra = Mapping[str, tuple[float, ...]]

_MOST_WORK = 100_000_000
"""Maximum number of elementary steps of the exact search: about a third of a second."""
_MOST_EXCHANGES = 200


@dataclass(frozen=True, kw_only=True)
class Items:
    """Units of rank that can be bought, sorted by falling gain per parameter."""

    site_I: Ints
    gain_I: Floats
    kind_I: Ints
    """Index of each item's cost in `costs_K`."""
    costs_K: Ints
    """Distinct costs of a unit, in parameters."""
    budget: int

    @classmethod
    def offer(cls, gains_SU: Floats, costs_S: Ints, budget: int) -> Items:
        """Sort all units that gain something.

        Equal gains per parameter (to 12 digits, so that rounding decides nothing) go to the lower
        rank first and then to the earlier site.

        Args:
            gains_SU: gain of each site's first, second ... unit, shape (sites, units); rows do not increase.
            costs_S: number of parameters of one unit, per site.
            budget: number of parameters to spend.
        """
        site_I, level_I = np.nonzero(gains_SU > 0)
        gain_I = gains_SU[site_I, level_I]
        mantissa, exponent = np.frexp(gain_I / costs_S[site_I])
        density_I = np.ldexp(np.round(mantissa, 12), exponent)
        order = np.lexsort((site_I, level_I, -density_I))
        costs_K, kind_S = np.unique(costs_S, return_inverse=True)
        return cls(
            site_I=site_I[order], gain_I=gain_I[order], kind_I=kind_S[site_I[order]], costs_K=costs_K, budget=budget
        )

    @cached_property
    def divisor(self) -> int:
        """Greatest common divisor of the costs, in parameters; a smaller remainder of the budget cannot be spent."""
        return int(np.gcd.reduce(self.costs_K))

    @cached_property
    def _full(self) -> int:
        """Number of items in order that fit into the budget before the first that does not."""
        spent = np.cumsum(self.costs_K[self.kind_I])
        return int(np.searchsorted(spent, self.budget, side="right"))

    @cached_property
    def prefix_K(self) -> Ints:
        """Number of items per cost before the first item that does not fit."""
        return np.bincount(self.kind_I[: self._full], minlength=len(self.costs_K)).astype(np.int64)

    @cached_property
    def sums(self) -> list[Floats]:
        """Per distinct cost, the total gain of its best 0, 1, 2 ... items."""
        return [
            np.concatenate([[0.0], np.cumsum(self.gain_I[self.kind_I == kind])]) for kind in range(len(self.costs_K))
        ]

    def gain_of(self, count_K: Ints) -> float:
        """Return the gain of a solution."""
        return float(sum(sums[count] for sums, count in zip(self.sums, count_K, strict=True)))

    def units(self, count_K: Ints, sites: int) -> Ints:
        """Return a solution as units per site."""
        taken = np.zeros(len(self.site_I), dtype=bool)
        for kind, count in enumerate(count_K):
            taken[np.flatnonzero(self.kind_I == kind)[:count]] = True
        return np.bincount(self.site_I[taken], minlength=sites).astype(np.int64)

    def bound(self) -> float:
        """Return the optimum of the linear relaxation, which ends with a fraction of the next item."""
        gain = self.gain_of(self.prefix_K)
        if self._full < len(self.gain_I):
            usable = self.budget - self.budget % self.divisor
            left = usable - int(self.prefix_K @ self.costs_K)
            gain += float(self.gain_I[self._full]) * left / int(self.costs_K[self.kind_I[self._full]])
        return gain


def greedy(items: Items) -> Ints:
    """Return counts: the best gain per parameter first, then the integer repair.

    The repair adds units that still fit, and exchanges one kept unit for one of another cost as long
    as that increases the gain.
    """
    count_K, costs_K = items.prefix_K.copy(), items.costs_K
    left = items.budget - int(count_K @ costs_K)
    next_K, last_K = (np.empty(len(costs_K)) for _ in range(2))
    for _ in range(_MOST_EXCHANGES + len(items.gain_I)):
        for kind, sums in enumerate(items.sums):
            count = count_K[kind]
            next_K[kind] = sums[count + 1] - sums[count] if count + 1 < len(sums) else -np.inf
            last_K[kind] = sums[count] - sums[count - 1] if count else np.inf
        add = np.where(costs_K <= left, next_K, -np.inf)
        best = int(np.argmax(add))
        if add[best] > 0:
            count_K[best] += 1
            left -= int(costs_K[best])
            continue
        change = next_K[None, :] - last_K[:, None]
        change[costs_K[None, :] - costs_K[:, None] > left] = -np.inf
        out, into = np.unravel_index(int(np.argmax(change)), change.shape)
        if not change[out, into] > 1e-12 * max(float(last_K[out]), 0.0):
            break
        count_K[out] -= 1
        count_K[into] += 1
        left -= int(costs_K[into] - costs_K[out])
    return count_K


def exact(items: Items) -> Ints | None:
    """Return the best counts by dynamic programming, or None beyond `_MOST_WORK` steps.

    The costs are divided by their greatest common divisor; D is the largest that remains. An
    optimal integer solution lies within 2·D + 1 items of the relaxation's optimum (Eisenbrand &
    Weismantel 2018, 1707.00481, with one row), so the programme runs over the distinct
    costs with a window of counts around the relaxation and of spent units around its cost. It
    is fast where the costs share a large divisor, as the widths of a transformer do.
    """
    units_K = items.costs_K // items.divisor
    largest = int(units_K.max())
    window = 2 * largest + 2
    reach = min(window * largest, int(items.prefix_K @ units_K) + items.budget // items.divisor)
    states = 2 * reach + 1
    if len(units_K) * (2 * window + 1) * states > _MOST_WORK:
        return None
    value_X = np.full(states, -np.inf)  # X: spent units beyond the relaxation's, plus reach
    value_X[reach] = 0.0
    chosen = []
    for unit, start, sums in zip(units_K, items.prefix_K, items.sums, strict=True):
        value_X, counts_X = _extend(value_X, int(unit), int(start), sums, window)
        chosen.append(counts_X)
    left = items.budget // items.divisor - int(items.prefix_K @ units_K)
    at = int(np.argmax(value_X[: min(states, reach + left + 1)]))
    count_K = items.prefix_K.copy()
    for kind in reversed(range(len(units_K))):
        count_K[kind] = chosen[kind][at]
        at -= int(units_K[kind] * (count_K[kind] - items.prefix_K[kind]))
    return count_K


def _extend(value_X: Floats, unit: int, start: int, sums: Floats, window: int) -> tuple[Floats, Ints]:
    """Add one distinct cost: return the best value at each spent amount, and the count that gives it."""
    states = len(value_X)
    best_X, count_X = np.full(states, -np.inf), np.zeros(states, dtype=np.int64)
    for count in range(max(0, start - window), min(len(sums), start + window + 1)):
        shift = unit * (count - start)
        low, high = max(0, shift), min(states, states + shift)
        if low >= high:
            continue
        offered = value_X[low - shift : high - shift] + (sums[count] - sums[start])
        better = offered > best_X[low:high]
        best_X[low:high][better] = offered[better]
        count_X[low:high][better] = count
    return best_X, count_X


# The gain of ranks by measured spectra.


def gain_table(problem: AllocationProblem, spectra: Spectra) -> Floats:
    """Return the gain of each rank of each site, shape (sites, longest spectrum); 0 beyond a spectrum's end."""
    rows = []
    for site in problem.sites:
        if site.name not in spectra:
            raise AllocationError(f"the spectra do not hold {site.name}; profile this model again.")
        rows.append(np.asarray(spectra[site.name], dtype=float))
    table_SR = np.zeros((len(rows), max(1, *(len(row) for row in rows))))
    for index, row in enumerate(rows):
        table_SR[index, : len(row)] = row
    if not np.isfinite(table_SR).all() or (table_SR < 0).any():
        raise AllocationError(
            "the spectra are degenerate (negative or non-finite); use more calibration batches or another metric."
        )
    if (np.diff(table_SR, axis=1) > 1e-9 * table_SR.max()).any():
        raise AllocationError("the spectra increase somewhere; required: largest value first.")
    return table_SR


def captured(gains_SR: Floats, ranks: Sequence[int]) -> float:
    """Return the gain of ranks: each site's spectrum summed up to its rank."""
    return float(gains_SR[_kept(gains_SR, ranks)].sum())


def idle_parameters(problem: AllocationProblem, gains_SR: Floats, ranks: Sequence[int]) -> int:
    """Return the number of parameters in ranks for which the spectra predict no gain."""
    gaining_S = (_kept(gains_SR, ranks) & (gains_SR > 0)).sum(axis=1)
    return problem.cost_of(ranks) - problem.cost_of([int(count) for count in gaining_S])


def _kept(gains_SR: Floats, ranks: Sequence[int]) -> NDArray[np.bool_]:
    return np.arange(gains_SR.shape[1])[None, :] < np.asarray(ranks)[:, None]


def unit_gains(gains_SR: Floats, problem: AllocationProblem) -> Floats:
    """Return the gain of each unit of `multiple` ranks between a site's limits, shape (S, U)."""
    sites, ranks = gains_SR.shape
    step = problem.multiple
    low, high = np.asarray(problem.lower)[:, None], np.asarray(problem.upper)[:, None]
    units = max(1, -(-ranks // step))
    sums_SR = np.concatenate([np.zeros((sites, 1)), np.cumsum(gains_SR, axis=1)], axis=1)
    ends_SU = np.minimum(low + step * np.arange(units + 1)[None, :], high)
    return np.diff(np.take_along_axis(sums_SR, np.minimum(ends_SU, ranks), axis=1), axis=1)
