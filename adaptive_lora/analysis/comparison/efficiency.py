"""Cost against loss: fronts, the area under them, and the early rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import UNITS, Cost, EarlyRate, FrontArea, ParetoFront, ParetoPoint
from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.analysis.comparison.trials import (
    Folds,
    Reader,
    TrialTable,
    loss_of,
    metric,
    per_seed,
    served_parameters,
    trained_parameters,
)
from adaptive_lora.analysis.comparison.types import MethodSummary
from adaptive_lora.analysis.comparison.wording import joined, named
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.results import FloatArray, TrialRecord

_DRAWS = 2_000
BUDGET_OPTIONS = ("rank", "budget")
"""An option of a method with one of these words in its name sets how much it may spend."""


_READERS: Mapping[Cost, Reader] = {
    Cost.TRAINED: trained_parameters,
    Cost.SERVED: served_parameters,
    Cost.TIME: metric("train_seconds"),
    Cost.MEMORY: metric("peak_memory_bytes"),
}
_LEFT_OUT = {
    Cost.TIME: "Training steps alone, without validation; depends on the machine and its load.",
    Cost.MEMORY: "On a CPU: resident memory of the whole process, also what earlier trials left.",
}


def fronts(table: TrialTable, methods: Sequence[MethodSummary], outcome: Outcome, seed: int) -> tuple[ParetoFront, ...]:
    """Return loss against every cost that was recorded, each method at its own best rate."""
    made = (_front(cost, table, methods, outcome, seed) for cost in Cost)
    return tuple(front for front in made if front is not None)


def _front(
    cost: Cost, table: TrialTable, methods: Sequence[MethodSummary], outcome: Outcome, seed: int
) -> ParetoFront | None:
    costs, losses, absent = {}, {}, []
    for method in methods:
        trials = table.seeds_at(method.label, method.lr)
        if known := per_seed(trials, _READERS[cost]):
            costs[method.label] = known
            losses[method.label] = per_seed(trials, loss_of)
        elif trials:
            absent.append(method.label)
    if not costs:
        return None
    labels = list(costs)
    cost_M = [float(np.mean(list(costs[label].values()))) for label in labels]
    loss_M = [float(np.mean(list(losses[label].values()))) for label in labels]
    front_M = stats.pareto_front(cost_M, outcome.sign * np.asarray(loss_M))
    common = sorted(set.intersection(*(set(costs[m]) & set(losses[m]) for m in labels)))
    shares: list[float | None] = [None] * len(labels)
    if len(common) > 1:
        cost_SM, loss_SM = ([[values[label][s] for label in labels] for s in common] for values in (costs, losses))
        drawn = stats.front_share(cost_SM, outcome.sign * np.asarray(loss_SM), draws=_DRAWS, seed=seed)
        shares = [float(share) for share in drawn]
    points = [
        ParetoPoint(method=label, cost=c, loss=loss, on_front=bool(on), front_share=share)
        for label, c, loss, on, share in zip(labels, cost_M, loss_M, front_M, shares, strict=True)
    ]
    missing = f" Not recorded: {named(absent)}." if absent else ""
    return ParetoFront(
        cost=cost,
        unit=UNITS[cost],
        points=tuple(sorted(points, key=lambda point: (point.cost, point.loss))),
        note=(_LEFT_OUT.get(cost, "") + missing).strip(),
    )


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    """Name of the method, with the options in which families of this name differ."""
    methods: tuple[str, ...]
    """Labels by rising parameters."""
    parameters_K: FloatArray
    loss_SK: FloatArray
    """Test losses over the seeds that all members have, by seed and member."""
    seeds: tuple[int, ...]


def _families(table: TrialTable, methods: Sequence[MethodSummary]) -> list[_Family]:
    """Return methods grouped by everything but what they may spend, baseline's family first."""
    members: dict[tuple[tuple[str, str], ...], list[MethodSummary]] = defaultdict(list)
    for method in methods:
        if records := table.records_at(method.label, method.lr):
            members[_nature(records[0])].append(method)
    natures = [dict(nature) for nature in members]
    families = []
    for nature, group in zip(natures, members.values(), strict=True):
        group = sorted(group, key=lambda m: m.parameters.mean or 0)
        losses = [per_seed(table.seeds_at(m.label, m.lr), loss_of) for m in group]
        seeds = tuple(sorted(set.intersection(*map(set, losses))))
        rivals = [other for other in natures if other["name"] == nature["name"]]
        differing = [key for key in sorted(nature) if len({other.get(key) for other in rivals}) > 1]
        extra = ", ".join(f"{key}={nature[key]}" for key in differing)
        families.append(
            _Family(
                f"{nature['name']} ({extra})" if extra else nature["name"],
                tuple(m.label for m in group),
                np.array([m.parameters.mean or 0.0 for m in group]),
                np.array([[one[s] for one in losses] for s in seeds]).reshape(-1, len(group)),
                seeds,
            )
        )
    return families


def _nature(record: TrialRecord) -> tuple[tuple[str, str], ...]:
    """Return a method's options without those that set what it may spend."""
    own = {
        key.removeprefix("method."): value
        for key, value in record.settings.items()
        if key.startswith("method.") and not any(word in key for word in BUDGET_OPTIONS)
    }
    return tuple(sorted(own.items())) or (("name", record.method),)


def front_areas(
    table: TrialTable, methods: Sequence[MethodSummary], *, frozen_loss: float | None, confidence: float, seed: int
) -> tuple[FrontArea, ...]:
    """Return the area under each family's front; the definition is in `FrontArea`."""
    families = _families(table, methods)
    wide = [f for f in families if len(f.methods) > 1 and f.seeds]
    low = max((float(f.parameters_K.min()) for f in wide), default=0.0)
    high = min((float(f.parameters_K.max()) for f in wide), default=0.0)
    common = sorted(set.intersection(*(set(f.seeds) for f in wide))) if wide else []
    reason = ""
    if frozen_loss is None:
        reason = "no score of the frozen base to measure gains from"
    elif wide and not low < high:
        reason = "families with several budgets have no range of budgets in common"
    elif wide and not common:
        reason = "families have no seed in common"
    drawn: dict[str, FloatArray] = {}
    if frozen_loss is not None and not reason:
        drawn = {f.name: _gains(f, common, low=low, high=high, reference=frozen_loss, seed=seed) for f in wide}

    def interval(draw_B: FloatArray) -> Interval:
        return stats.interval_of_draws(draw_B[1:], estimate=float(draw_B[0]), seeds=len(common), confidence=confidence)

    areas = []
    for family in families:
        gain_B, baseline_B = drawn.get(family.name), drawn.get(families[0].name)
        single = len(family.methods) == 1
        area = FrontArea(
            family=family.name,
            methods=family.methods,
            parameters=tuple(map(float, family.parameters_K)),
            losses=tuple(map(float, family.loss_SK.mean(axis=0))) if family.seeds else (),
            low=None,
            high=None,
            gain=None,
            interval=Interval.missing("no area"),
            difference=None,
            difference_interval=Interval.missing("no area" if gain_B is None else "no other family to compare with"),
            note="one budget only: a point, not a front" if single else reason or "its members have no seed in common",
        )
        if gain_B is not None:
            area = replace(area, low=low, high=high, gain=float(gain_B[0]), interval=interval(gain_B), note="")
            if family is not families[0] and baseline_B is not None:
                apart_B = gain_B - baseline_B
                area = replace(area, difference=float(apart_B[0]), difference_interval=interval(apart_B))
        areas.append(area)
    return tuple(areas)


def _gains(
    family: _Family, seeds: Sequence[int], *, low: float, high: float, reference: float, seed: int
) -> FloatArray:
    """Return the gain over the observed seeds first, then over each bootstrap draw of seeds (1 + B)."""
    rows = [family.seeds.index(one) for one in seeds]
    drawn_BS = np.random.default_rng(seed).integers(0, len(rows), (_DRAWS, len(rows)))
    mean_BK = family.loss_SK[rows][np.vstack([np.arange(len(rows)), drawn_BS])].mean(axis=1)
    return stats.front_gain(family.parameters_K, mean_BK, low=low, high=high, reference=reference)


def early_rate(
    trials: Mapping[int, Folds], base: Mapping[int, Folds], confidence: float, seed: int
) -> EarlyRate | None:
    """Return the tokens to the baseline's final loss; None where no curve was recorded."""
    tokens, shares, missed = [], [], []
    for one in sorted(set(trials) & set(base)):
        pairs = list(zip(trials[one], base[one], strict=True))
        if not all(mine.validation_tokens and theirs.validation_tokens for mine, theirs in pairs):
            continue
        reached = [
            stats.first_reached(
                mine.validation_tokens, [loss for _, loss in mine.validation_curve], theirs.validation_loss
            )
            for mine, theirs in pairs
        ]
        known = [value for value in reached if value is not None]
        if len(known) < len(reached):
            missed.append(str(one))
            continue
        tokens.append(float(np.mean(known)))
        totals = [theirs.validation_tokens[-1] for _, theirs in pairs]
        shares.append(float(np.mean([k / total for k, total in zip(known, totals, strict=True)])))
    if not shares and not missed:
        return None
    note = f"not reached under seed {joined(missed)}" if missed else ""
    interval = Interval.missing(note) if missed else stats.mean_interval(shares, confidence=confidence, seed=seed)
    return EarlyRate(
        reached=len(shares),
        seeds=len(shares) + len(missed),
        tokens=None if missed else float(np.mean(tokens)),
        share=None if missed else float(np.mean(shares)),
        interval=interval,
        note=note,
    )
