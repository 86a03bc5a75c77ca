"""Gain of each rank by measured spectra, as tables over sites and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adaptive_lora.allocation.knapsack import Floats
from adaptive_lora.allocation.problem import AllocationProblem
from adaptive_lora.errors import AllocationError

Spectra = Mapping[str, tuple[float, ...]]


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
