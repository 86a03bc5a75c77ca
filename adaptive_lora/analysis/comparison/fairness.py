"""The fairness audit: checks whether a comparison is fair, shown before any result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adaptive_lora.allocation import Scaling
from adaptive_lora.analysis.comparison.findings import AuditEntry, AuditKind
from adaptive_lora.analysis.comparison.trials import TrialTable, rate_text
from adaptive_lora.analysis.comparison.types import MATCHED_SHARE, MethodSummary
from adaptive_lora.analysis.comparison.wording import count, joined, named, percent, plural, signed, span
from adaptive_lora.config import option_fields
from adaptive_lora.results import TrialRecord

TAGS = {
    "precision": "precision",
    "device": "device",
    "data_digest": "data digest",
    "tokens_digest": "token ids and loss masks",
    "base_hash": "base hash",
    "code_version": "code version",
    "packages": "package versions",
}
"""Tag that must not differ between trials that are compared -> topic of its entry."""

_MOST_REASONS = 2
"""Reasons of failed trials that a finding lists; the table of failed trials has all."""

Used = Sequence[tuple[str, TrialRecord]]
"""Label of the method and record of every trial that is compared."""


def audit(table: TrialTable, methods: Sequence[MethodSummary]) -> tuple[AuditEntry, ...]:
    """Return at least one entry a topic, with the check and its finding.

    Args:
        table: the trials.
        methods: their summaries, baseline first.
    """
    used = [(m.label, record) for m in methods for record in table.records_at(m.label, m.lr)]
    return (
        *_parameters(methods),
        *_failures(table, methods),
        *_rates(table, methods),
        *_training_cost(used),
        *_skipped(used),
        *_scaling(used),
        *(_race(table) if table.raced else ()),
        *_order(used),
        *_together(used),
        *(entry for tag, topic in TAGS.items() for entry in _tag(used, tag, topic)),
        *_settings(used),
    )


def _entries(topic: str, *, fair: str, unfair: Sequence[str] = (), unknown: str = "") -> list[AuditEntry]:
    """Return an entry for each unfair finding; without one, what was not recorded, or else the fair finding."""
    if unfair:
        return [AuditEntry(topic=topic, kind=AuditKind.BAD, text=text) for text in unfair]
    kind = AuditKind.UNKNOWN if unknown else AuditKind.OK
    return [AuditEntry(topic=topic, kind=kind, text=unknown or fair)]


def _by_value(pairs: Iterable[tuple[Any, str]]) -> Mapping[Any, Sequence[str]]:
    """Return value -> sorted labels of the methods with a trial that recorded it."""
    labels: dict[Any, set[str]] = defaultdict(set)
    for value, label in pairs:
        if value is not None:
            labels[value].add(label)
    return {value: sorted(who) for value, who in labels.items()}


def _differing(used: Used, value_of: Callable[[TrialRecord], Any]) -> list[tuple[int, Mapping[Any, Sequence[str]]]]:
    """Return seed and `_by_value` of the trials of one seed and fold, which are compared, where they differ."""
    pairs: dict[tuple[int, int], list[tuple[Any, str]]] = defaultdict(list)
    for label, record in used:
        pairs[record.seed, record.fold].append((value_of(record), label))
    groups = [(seed, _by_value(found)) for (seed, _), found in pairs.items()]
    return [(seed, values) for seed, values in groups if len(values) > 1]


def _parameters(methods: Sequence[MethodSummary]) -> list[AuditEntry]:
    baseline, *others = methods
    unequal, unfair = [], []
    for method in others:
        difference, share = method.parameters.difference, method.parameters.share
        if difference and not method.parameters.matched and method.seeds:
            relative = "" if share is None else f", {percent(share)}"
            unequal.append(f"{method.label} {count(method.parameters.mean)} ({signed(difference, 0)}{relative})")
    if unequal:
        unfair.append(f"Unequal parameters. {baseline.label} has {count(baseline.parameters.mean)}; {joined(unequal)}.")
    for method in methods:
        least, most = method.parameters.least, method.parameters.most
        if least and most and most - least >= MATCHED_SHARE * most:
            unfair.append(f"{method.label}: parameters differ between seeds, from {count(least)} to {count(most)}.")
    each = named([f"{m.label} {count(m.parameters.mean)}" for m in methods if m.seeds], 8)
    fair = f"Equal parameters up to what whole ranks leave over: {each}."
    unknown = ""
    if absent := [m.label for m in methods if m.seeds and m.parameters.mean is None]:
        unknown = f"Parameters: not given for {named(absent)}, so that equal budgets cannot be checked."
    return _entries("parameters", fair=fair, unfair=unfair, unknown=unknown)


def _failures(table: TrialTable, methods: Sequence[MethodSummary]) -> list[AuditEntry]:
    unfair = []
    for method in methods:
        reasons = Counter(failure.reason for failure in method.failures)
        if reasons:
            first = reasons.most_common(_MOST_REASONS)
            listed = "; ".join(f"{reason} ({number})" for reason, number in first)
            if rest := reasons.total() - sum(number for _, number in first):
                listed += f"; {rest} with other reasons"
            unfair.append(f"{method.label}: {plural(reasons.total(), 'failed trial')}: {listed}.")
        if not method.seeds:
            unfair.append(f"{method.label}: no seed finished, so it is not compared.")
        elif method.missing_seeds:
            rate = "" if method.lr is None else f" at its learning rate {method.lr:g}"
            unfair.append(
                f"{method.label}: {len(method.missing_seeds)} of {len(table.seeds)} seeds missing{rate} "
                f"(seed {joined(list(map(str, method.missing_seeds)))}); pairs use the others."
            )
    fair = f"No trial failed; every method has all {plural(len(table.seeds), 'seed')}."
    if any(len(method.seeds) < len(table.seeds) for method in methods):  # none of them missing
        fair = "No trial failed; every method has all seeds up to the look that decided it."
    return _entries("failures", fair=fair, unfair=unfair)


def _rates(table: TrialTable, methods: Sequence[MethodSummary]) -> list[AuditEntry]:
    unfair = []
    grids: dict[tuple[float | None, ...], list[str]] = defaultdict(list)
    for method in methods:
        grids[table.rates[method.label]].append(method.label)
    if (None,) in grids:
        text = f"Learning rates: not given for {named(grids[None,])}, so that equal tuning cannot be checked."
        return _entries("tuning", fair="", unknown=text)
    if len(grids) > 1:
        listed = "; ".join(
            f"{joined(names)}: {len(grid)} ({', '.join(map(rate_text, grid))})" for grid, names in grids.items()
        )
        unfair.append(f"Methods had different learning rates to choose from: {listed}.")
    if max(len(grid) for grid in grids) == 1:
        unfair.append("One learning rate only: a method may look worse because its best rate is another one.")
    for method in methods:
        grid = table.rates[method.label]
        if len(grid) > 1 and method.lr in (grid[0], grid[-1]):
            end = "lowest" if method.lr == grid[0] else "highest"
            unfair.append(
                f"{method.label}: its best learning rate {rate_text(method.lr)} is the {end} of the grid; "
                "a better one may lie outside."
            )
    fair = (
        f"Every method was tuned over the same {len(table.rates[methods[0].label])} learning rates, "
        "and no best rate is at the end of the grid."
    )
    return _entries("tuning", fair=fair, unfair=unfair)


def _training_cost(used: Used) -> list[AuditEntry]:
    most: dict[str, tuple[float, int]] = {}
    if not any(record.metrics for _, record in used):
        return _entries("training cost", fair="", unknown="Training cost: not recorded.")
    times: dict[str, int] = {}
    for label, record in used:
        times[label] = int(record.metrics.get("trainings", 1))
        trained = record.metrics.get("training_parameters", 0.0)
        served = record.trainable_parameters or 0
        allowed = max(served, record.plan.get("budget") or 0)
        if trained > max(allowed, most.get(label, (0.0, 0))[0]):
            most[label] = (trained, served)
    unfair = [
        f"{label}: trained up to {count(trained)} parameters to end with {count(final)}; the "
        "comparison is at equal final parameters, not at equal training cost."
        for label, (trained, final) in most.items()
    ]
    unfair += [
        f"{label}: trained {number} times a trial; only one of these gives the weights."
        for label, number in times.items()
        if number > 1
    ]
    fair = "No method trained more parameters than it serves, or more than once."
    return _entries("training cost", fair=fair, unfair=unfair)


def _skipped(used: Used) -> list[AuditEntry]:
    steps: Counter[str] = Counter()
    if not any(record.metrics for _, record in used):
        return _entries("skipped steps", fair="", unknown="Skipped steps: not recorded.")
    for label, record in used:
        steps[label] += int(record.metrics.get("skipped_steps", 0))
    unfair = [f"{label}: {plural(n, 'training step')} skipped as not finite." for label, n in steps.items() if n]
    return _entries("skipped steps", fair="No training step was skipped.", unfair=unfair)


def _scaling(used: Used) -> list[AuditEntry]:
    """Compare factor x rank: Adam's first update of B·A grows with it."""
    if not any(record.plan for _, record in used):
        return _entries("scaling", fair="", unknown="Scaling: no ranks were recorded.")
    sizes: dict[str, set[float]] = defaultdict(set)
    policies: dict[str, None] = {}  # in the order of the methods
    for label, record in used:
        if "sites" not in record.plan:
            continue  # no ranks
        policies[record.plan["scaling"]] = None
        sizes[label] |= {float(f"{site['step_size']:.4g}") for site in record.plan["sites"]}
    unfair = []
    if len(set().union(*sizes.values())) > 1:
        listed = "; ".join(f"{label}: {span(values, '{:g}'.format)}" for label, values in sizes.items())
        names = joined([f"{policy} (factor {Scaling(policy).formula})" for policy in policies])
        unfair.append(
            f"Factor x rank is not the same everywhere under scaling {names}: {listed}. Adam's first update grows with "
            "it, so rank and step size change together; a difference between methods may be one of learning rates."
        )
    fair = (
        "Factor x rank, to which Adam's first update is in proportion, is the same at every site of every method "
        "with LoRA's ranks: rank does not act as a learning rate."
    )
    return _entries("scaling", fair=fair if sizes else "Scaling: no method has LoRA's ranks.", unfair=unfair)


def _race(table: TrialTable) -> list[AuditEntry]:
    """Say which rates a race stopped."""
    stopped = Counter(method for method, _ in table.raced)
    whole = [label for label in table.methods if label not in stopped]
    listed = "; ".join(f"{label}: {stopped[label]} of {len(table.rates[label])}" for label in table.methods)
    text = (
        f"Learning rates that fell behind were stopped on the way and not compared ({listed}), by "
        "their validation losses and one rule for all methods."
    )
    unequal = f"{text} Of {named(whole)} no rate was stopped: their choice is from more trainings to the end."
    return _entries("race", fair=text, unfair=[unequal] if whole else [])


def _order(used: Used) -> list[AuditEntry]:
    """Compare the digests of the batches that were learned from, seed by seed.

    Trials that early stopping ended have a shorter order and are no evidence against it.
    """

    def digest(record: TrialRecord) -> str | None:
        return None if record.metrics.get("stopped_early") else record.tags.get("order_digest") or None

    differing, unfair = _differing(used, digest), []
    if differing:
        seed, groups = differing[0]
        sides = " against ".join(map(named, groups.values()))
        unfair.append(
            "Not every method learned from the same batches in the same order: "
            f"{plural(len(differing), 'seed')} differ, such as seed {seed} ({sides})."
        )
    unknown = ""
    if absent := sum(digest(record) is None for _, record in used):
        unknown = f"Data order: {absent} of {plural(len(used), 'trial')} did not record it or stopped early."
    fair = "Under each seed every method learned from the same batches in the same order."
    return _entries("data order", fair=fair, unfair=unfair, unknown=unknown)


def _together(used: Used) -> list[AuditEntry]:
    """Compare among how many trials each was trained: a group shares its time and memory."""
    groups = _by_value((record.metrics.get("trials_together"), label) for label, record in used)
    sides = {"alone" if n == 1 else f"among {n:.0f} trials at once": named(groups[n]) for n in sorted(groups)}
    unfair = []
    if len(groups) > 1:
        listed = "; ".join(f"{how}: {who}" for how, who in sides.items())
        unfair.append(
            f"Not every trial was trained among as many others ({listed}): training times and peak memory do not "
            "compare, losses do."
        )
    unknown = ""
    if any("trials_together" not in record.metrics for _, record in used):
        unknown = "Time and memory: not every trial recorded whether it was trained alone."
    fair = f"Every trial was trained {joined(list(sides))}, so times and memory compare."
    return _entries("time and memory", fair=fair, unfair=unfair, unknown=unknown)


def _tag(used: Used, tag: str, topic: str) -> list[AuditEntry]:
    values = _by_value((record.tags.get(tag), label) for label, record in used)
    unfair, unknown = [], ""
    if _differing(used, lambda record: record.tags.get(tag)):
        listed = "; ".join(f"{value}: {joined(who)}" for value, who in values.items())
        unfair.append(f"Trials differ in {topic}: {listed}.")
    if absent := sum(tag not in record.tags for _, record in used):
        unknown = f"{topic.capitalize()}: not recorded by {absent} of {plural(len(used), 'trial')}."
    fair = f"All trials have the same {topic}: {joined(list(values))}."
    if len(values) > 1:
        fair = f"Under each seed all trials have the same {topic}, of {len(values)}: {joined(list(values))}."
    return _entries(topic, fair=fair, unfair=unfair, unknown=unknown)


def _settings(used: Used) -> list[AuditEntry]:
    """Compare the settings that trials of one study share, such as epochs and batch size."""
    free = {name for name, (_, field, _) in option_fields().items() if not field.metadata["identity"]}
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for label, record in used:
        for key, value in record.settings.items():
            if key.startswith("cfg."):
                found[key.removeprefix("cfg.")][value].add(label)
    found = {name: values for name, values in found.items() if name not in free}
    differing = [
        f"{name}: {' against '.join(f'{value} ({named(sorted(who))})' for value, who in values.items())}"
        for name, values in found.items()
        if len(values) > 1 and _differing(used, lambda record, key=f"cfg.{name}": record.settings.get(key))  # type: ignore[misc]
    ]
    return _entries(
        "settings",
        fair="All trials share their settings of data, training and evaluation.",
        unfair=[*([f"Trials differ in settings: {'; '.join(differing)}."] if differing else []), *_dropout(used)],
        unknown="" if found else "Settings: not recorded.",
    )


def _dropout(used: Used) -> list[str]:
    """Name the methods without the dropout of a study, which acts before LoRA's A."""
    given = [(label, record) for label, record in used if float(record.settings.get("cfg.dropout", 0)) > 0]
    without = list(dict.fromkeys(label for label, record in given if record.plan and "sites" not in record.plan))
    if not without:
        return []
    probability = given[0][1].settings["cfg.dropout"]
    return [f"Dropout of {probability} acts before LoRA's A alone: {named(without)} trained without it."]
