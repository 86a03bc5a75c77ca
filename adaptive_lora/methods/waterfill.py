"""Water-filling: the ranks with the largest gain by measured spectra within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from adaptive_lora.allocation.budget import check_budget, fit_to_budget
from adaptive_lora.allocation.certificate import Certificate
from adaptive_lora.allocation.knapsack import (
    Floats,
    Items,
    Spectra,
    captured,
    exact,
    gain_table,
    greedy,
    idle_parameters,
    unit_gains,
)
from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import MAYBE_SPECTRAL, RANK, SPECTRAL_METRICS, ProfileSummary
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option

_UNSURE = 0.05
"""Quantile of the replicates that is the lower bound of the headroom."""


@dataclass(frozen=True, kw_only=True)
class Waterfill(RankMethod):
    """Ranks by gain per parameter, sorted over all sites.

    If a site's first r ranks gain v_1 + ... + v_r and gains add up over sites, keeping every rank
    whose gain per parameter is above one global level is optimal at each budget that it exhausts
    (Eckart-Young and a Lagrange multiplier; reverse water-filling, Cover & Thomas 2006, section
    10.3.3). With v_i = sigma_i^2 / 2 of the whitened gradient, the gain is the loss decrease of the
    local quadratic model, in nats. The budget left by integer ranks is spent by a repair step, or by
    an exact search where the costs share a divisor; the plan has the certificate.
    """

    name: ClassVar[str] = "waterfill"
    metric: str = option(
        "whitened_gradient",
        "importance metric whose spectrum gives the gain of each rank",
        limits=Limits(choices=MAYBE_SPECTRAL),
        label="{}",
    )
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)
    abstain: float | None = option(
        None,
        "plan uniform ranks if the lower bound of the predicted gain over uniform is below this share",
        limits=Limits(low=0),
        label="ab{:g}",
    )

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the ranks with their certificate.

        Raises:
            AllocationError: there are no spectra, they are degenerate, or there are no replicates for `abstain`.
        """
        profile = self._checked_profile(problem)
        budget = uniform_cost(problem.sites, self.rank) if problem.budget is None else problem.budget
        gains_SR = gain_table(problem, profile.spectra or {})
        filled = _fill(problem, gains_SR, budget)
        uniform = problem.uniform(budget)
        worth = captured(gains_SR, uniform)
        if worth <= 0:
            raise AllocationError(
                f"the {profile.metric} spectra are degenerate: uniform ranks capture nothing; use "
                "more calibration batches, another metric or a larger budget."
            )
        best = captured(gains_SR, filled.ranks)
        certificate = Certificate(
            metric=profile.metric,
            captured=best,
            bound=max(best, filled.bound),
            optimal=filled.optimal,
            best=best,
            uniform=worth,
            idle_parameters=idle_parameters(problem, gains_SR, filled.ranks),
            replicates=len(profile.replicates),
            headroom_lower=_headroom_lower(problem, profile.replicates, budget, uniform),
            threshold=self.abstain,
            everything=float(gains_SR.sum()),
            covering_rank=int((gains_SR > 0).sum(axis=1).max()),
        )
        if not certificate.abstained:
            return Solution(ranks=filled.ranks, budget=budget, certificate=certificate)
        return Solution(ranks=uniform, budget=budget, certificate=replace(certificate, captured=worth))

    def _checked_profile(self, problem: AllocationProblem) -> ProfileSummary:
        profile = problem.profile
        if profile is None:
            raise AllocationError(
                "waterfill needs an importance profile; none was given (`adaptive-lora profile` writes one)."
            )
        if profile.spectra is None:
            raise AllocationError(
                f"waterfill needs a spectrum per site; the {profile.metric} profile has none. "
                f"Metrics that have one: {', '.join(SPECTRAL_METRICS)}."
            )
        if self.abstain is not None and len(profile.replicates) < 2:
            raise AllocationError(
                "waterfill with abstain needs spectra measured on 2 or more subsets of the "
                f"calibration data; the {profile.metric} profile has "
                f"{len(profile.replicates)}. Use more calibration batches or leave out abstain."
            )
        return profile


@dataclass(frozen=True, kw_only=True, slots=True)
class _Filled:
    ranks: tuple[int, ...]
    bound: float
    optimal: bool


def _fill(problem: AllocationProblem, gains_SR: Floats, budget: int, *, prove: bool = True) -> _Filled:
    """Return the best ranks, the upper bound of the gain, and whether the ranks are proved optimal."""
    costs, step = problem.costs, problem.multiple
    spent = check_budget(costs, problem.lower, problem.upper, budget)
    least = captured(gains_SR, problem.lower)
    items = Items.offer(unit_gains(gains_SR, problem), np.asarray(costs, dtype=np.int64) * step, budget - spent)
    count_K, proved = greedy(items), exact(items) if prove else None
    if proved is not None and items.gain_of(proved) > items.gain_of(count_K) * (1 + 1e-12):
        count_K = proved
    bound, gain = items.bound(), items.gain_of(count_K)
    units = items.units(count_K, len(costs))
    taken = [low + step * int(unit) for low, unit in zip(problem.lower, units, strict=True)]
    # Parameters without gain by the spectra are spread evenly, so that the budget is spent.
    ranks = fit_to_budget((1.0,) * len(costs), costs, taken, problem.upper, budget, step)
    optimal = proved is not None or bound <= gain * (1 + 1e-12)
    return _Filled(ranks=tuple(ranks), bound=least + bound, optimal=optimal)


def _headroom_lower(
    problem: AllocationProblem, replicates: Sequence[Spectra], budget: int, uniform: Sequence[int]
) -> float | None:
    """Return the lower bound of the headroom, cross-fitted over replicates of the spectra.

    Ranks chosen on some spectra look good on the same spectra even if those are noise. So each
    replicate chooses ranks, the mean of the others gives their gain over uniform, and the bound is
    the 5 % quantile over replicates (for bootstrap resamples, the percentile bound).
    """
    if len(replicates) < 2:
        return None
    tables = [gain_table(problem, spectra) for spectra in replicates]
    longest = max(table.shape[1] for table in tables)
    stack_BSR = np.stack([np.pad(table, ((0, 0), (0, longest - table.shape[1]))) for table in tables])
    total_SR = stack_BSR.sum(axis=0)
    headrooms = []
    for table_SR in stack_BSR:
        others_SR = np.maximum(total_SR - table_SR, 0.0) / (len(tables) - 1)
        worth = captured(others_SR, uniform)
        chosen = _fill(problem, table_SR, budget, prove=False).ranks
        gain = captured(others_SR, chosen)
        headrooms.append((gain - worth) / worth if worth > 0 else 0.0)
    return float(np.quantile(headrooms, _UNSURE))
