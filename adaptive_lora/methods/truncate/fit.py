"""Truncation: train at a higher rank, then find the ranks by one global threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.allocate import rank_limits
from adaptive_lora.allocation.plan import rank_budget, revised
from adaptive_lora.methods.adapters import audit_moved
from adaptive_lora.methods.adapters.factors import Spectrum, read_factors, spectrum, write_factors
from adaptive_lora.methods.base import RankEvent, TrainedTrial, TrialContext
from adaptive_lora.methods.truncate import Truncate
from adaptive_lora.results import TrainResult


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """A finished training above the budget, and the truncation to it."""

    start: RankPlan
    cut: RankPlan
    result: TrainResult
    spectra: Mapping[str, Spectrum]

    @property
    def history(self) -> tuple[RankEvent, ...]:
        ranks = {entry.site.name: entry.rank for entry in self.start.entries}
        left = dict.fromkeys(ranks, 0) | self.cut.rank_pattern()
        return (RankEvent(step=0, ranks=ranks), RankEvent(step=len(self.result.losses), ranks=left))

    @property
    def kept_energy(self) -> float:
        """Share of the squared singular values of all updates that the truncation keeps."""
        ranks = self.cut.rank_pattern()
        kept = sum(float((found.values[: ranks.get(name, 0)] ** 2).sum()) for name, found in self.spectra.items())
        return kept / sum(float((found.values**2).sum()) for found in self.spectra.values())


def fit_truncate(options: Truncate, trial: TrialContext) -> TrainedTrial:
    """Train above the budget, and truncate the trained updates to it."""
    search = _search(options, trial, trainings=1)
    adapted = trial.attach(search.cut, head_as_trained=True)
    write_factors(
        adapted,
        {
            entry.site.name: search.spectra[entry.site.name].cut(entry.rank, search.cut.scale_of(entry))
            for entry in search.cut.entries
        },
    )
    return TrainedTrial(
        model=adapted,
        plan=search.cut,
        result=_as_cut(search.result, trial.validation_loss(adapted)),
        training_parameters=search.start.trainable_parameters,
        history=search.history,
        extra={
            "truncation/kept_energy": search.kept_energy,
            "truncation/uncut_validation_loss": search.result.validation_loss,
        },
    )


def _as_cut(result: TrainResult, loss: float) -> TrainResult:
    """Return a result with the truncated adapter's validation loss, also at the end of the curve.

    Learning rates are chosen by this loss; the full model's loss would choose them for another model.
    """
    (last, _) = result.validation_curve[-1]
    curve = (*result.validation_curve[:-1], (last, loss))
    return dataclasses.replace(result, validation_loss=loss, validation_curve=curve)


def fit_truncate_retrain(options: Truncate, trial: TrialContext) -> TrainedTrial:
    """Train above the budget to find the ranks, then train these from the seed's initial weights."""
    search = _search(options, trial, trainings=2)
    cut = dataclasses.replace(search.cut, trained_rank=None)
    adapted = trial.attach(cut)
    result = trial.train(adapted, trainings=2)
    audit_moved(adapted)
    return TrainedTrial(
        model=adapted,
        plan=cut,
        result=result,
        training_parameters=search.start.trainable_parameters,
        history=search.history,
        search_seconds=search.result.seconds,
        extra={"truncation/kept_energy": search.kept_energy},
    )


def _search(options: Truncate, trial: TrialContext, *, trainings: int) -> _Search:
    plan = trial.plan
    start = options.start_plan(plan)
    adapted = trial.attach(start)
    result = trial.train(adapted, trainings=trainings)
    audit_moved(adapted)
    scales = {entry.site.name: start.scale_of(entry) for entry in start.entries}
    spectra = {name: spectrum(site, scales[name]) for name, site in read_factors(adapted).items()}
    trial.release()
    sites = [entry.site for entry in start.entries]
    ranks = rank_limits(trial.method, sites, least=0).by_value(
        [spectra[site.name].values.tolist() for site in sites],
        [site.parameters_per_rank for site in sites],
        rank_budget(plan),
        one_threshold=True,
    )
    names = [entry.site.name for entry in start.entries]
    cut = revised(start, dict(zip(names, ranks, strict=True)))
    return _Search(start=start, cut=cut, result=result, spectra=spectra)
