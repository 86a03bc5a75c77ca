"""Allocations across seeds, metrics, methods and tasks: their agreement, and the sites they favour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import Agreement, AgreementKind, BudgetMap
from adaptive_lora.analysis.comparison.trials import TrialTable
from adaptive_lora.analysis.comparison.types import MethodSummary
from adaptive_lora.results import TrialRecord

MOST_LABELS = 30
"""Maximum number of allocations of which every two are correlated one by one; the mean is over all."""
Ranks = Mapping[str, float]
"""Site name -> rank."""


def agreement(kind: AgreementKind, about: str, ranks: Mapping[str, Ranks]) -> Agreement | None:
    """Return the rank correlations between labelled allocations over their common sites.

    None below two allocations or three common sites.
    """
    if len(ranks) < 2:
        return None
    sites = sorted(set.intersection(*(set(one) for one in ranks.values())))
    if len(sites) < 3:
        return None
    rank_LK = np.array([[one[site] for site in sites] for one in ranks.values()])
    return Agreement(
        kind=kind,
        about=about,
        labels=tuple(ranks)[:MOST_LABELS],
        matrix=stats.rank_agreement(rank_LK[:MOST_LABELS]),
        mean=stats.mean_agreement(rank_LK),
        allocations=len(ranks),
        sites=len(sites),
    )


def agreements(table: TrialTable, methods: Sequence[MethodSummary]) -> tuple[Agreement, ...]:
    """Return every agreement that the trials allow, between seeds first."""
    trials = {m.label: table.records_at(m.label, m.lr) for m in methods}
    found = [
        agreement(AgreementKind.SEEDS, label, _by_seed(records, len(table.folds)))
        for label, records in trials.items()
        if any(_ranks(record) != _ranks(records[0]) for record in records)
    ]
    means = {label: _mean_ranks(records) for label, records in trials.items() if records}
    uneven = {label: ranks for label, ranks in means.items() if len(set(ranks.values())) > 1}
    found.append(agreement(AgreementKind.METHODS, "", uneven))
    by_metric: dict[str, dict[str, Ranks]] = defaultdict(dict)
    for label in uneven:
        settings = trials[label][0].settings
        if settings.get("method.metric") not in (None, "None"):
            by_metric[settings["method.name"]][settings["method.metric"]] = means[label]
    found += [agreement(AgreementKind.METRICS, name, one) for name, one in by_metric.items()]
    for label in uneven:
        tasks: dict[str, list[TrialRecord]] = defaultdict(list)
        for record in trials[label]:
            tasks[record.tags.get("data", "")].append(record)
        ranks = {task: _mean_ranks(records) for task, records in tasks.items()}
        found.append(agreement(AgreementKind.TASKS, label, ranks))
    return tuple(one for one in found if one is not None)


def _ranks(record: TrialRecord) -> Ranks:
    return {site["name"]: float(site["rank"]) for site in record.plan.get("sites", ())}


def _by_seed(records: Iterable[TrialRecord], folds: int) -> dict[str, Ranks]:
    return {f"seed {record.seed}" + (f" fold {record.fold}" if folds > 1 else ""): _ranks(record) for record in records}


def _mean_ranks(records: Iterable[TrialRecord]) -> Ranks:
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for site, rank in _ranks(record).items():
            values[site].append(rank)
    return {site: float(np.mean(ranks)) for site, ranks in values.items()}


def budget_maps(table: TrialTable, methods: Sequence[MethodSummary]) -> tuple[BudgetMap, ...]:
    """Return the shares of parameters by site, of every method that recorded its sites."""
    maps = []
    for method in methods:
        ranks: dict[tuple[int, str], list[float]] = defaultdict(list)
        spent: dict[tuple[int, str], float] = defaultdict(float)
        for record in table.records_at(method.label, method.lr):
            for site in record.plan.get("sites", ()):
                cell = int(site["layer"]), str(site["role"])
                ranks[cell].append(float(site["rank"]))
                spent[cell] += float(site["parameters"])
        if not (total := sum(spent.values())):
            continue
        layers = tuple(sorted({layer for layer, _ in ranks}))
        roles = tuple(dict.fromkeys(role for _, role in ranks))
        share_LR = np.array([[spent[layer, role] / total for role in roles] for layer in layers])
        means = {cell: float(np.mean(values)) for cell, values in ranks.items()}
        maps.append(
            BudgetMap(
                method=method.label,
                layers=layers,
                roles=roles,
                ranks=tuple(tuple(means.get((layer, role)) for role in roles) for layer in layers),
                shares=tuple(tuple(map(float, row)) for row in share_LR),
                by_layer=tuple(map(float, share_LR.sum(axis=1))),
                by_role=tuple(map(float, share_LR.sum(axis=0))),
            )
        )
    return tuple(maps)
