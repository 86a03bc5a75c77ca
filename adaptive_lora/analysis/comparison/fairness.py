"""The fairness audit: checks whether a comparison is fair, shown before any result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from adaptive_lora.allocation import Scaling
from adaptive_lora.analysis.comparison.findings import AuditEntry, AuditKind
from adaptive_lora.analysis.comparison.trials import TrialTable
from adaptive_lora.analysis.comparison.types import MATCHED_SHARE, MethodSummary
from adaptive_lora.analysis.comparison.wording import count, joined, named, percent, plural, signed
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

Used = Sequence[tuple[MethodSummary, TrialRecord]]


def audit(table: TrialTable, methods: Sequence[MethodSummary]) -> tuple[AuditEntry, ...]:
    """Return at least one entry a topic, with the check and its finding.

    Args:
        table: the trials.
        methods: their summaries, baseline first.
    """
    used = [
        (method, record)
        for method in methods
        for folds in table.seeds_at(method.label, method.lr).values()
        for record in folds
    ]
    topics: dict[str, tuple[Iterable[str], str]] = {
        "parameters": (_parameters(methods), _same_parameters(methods)),
        "failures": (
            _failures(table, methods),
            f"No trial failed; every method has all {plural(len(table.seeds), 'seed')}.",
        ),
        "tuning": (
            _rates(table, methods),
            f"Every method was tuned over the same {len(table.rates[methods[0].label])} learning "
            "rates, and no best rate is at the end of the grid.",
        ),
        "training cost": (
            _training_parameters(used),
            "No method trained more parameters than it serves, or more than once.",
        ),
        "skipped steps": (_skipped(used), "No training step was skipped."),
        "scaling": (
            _scaling(used),
            "Factor x rank, to which Adam's first update is in proportion, is the same at every "
            "site of every method: rank does not act as a learning rate.",
        ),
    }
    entries = [entry for topic, (bad, good) in topics.items() for entry in _entries(topic, bad, good)]
    entries += [*_race(table), _order(used), _together(used)]
    entries += [_tag(used, tag, topic) for tag, topic in TAGS.items()]
    entries.append(_settings(used))
    return tuple(entries)


def _entries(topic: str, bad: Iterable[str], good: str) -> Iterator[AuditEntry]:
    found = [AuditEntry(topic=topic, kind=AuditKind.BAD, text=text) for text in bad]
    yield from found or [AuditEntry(topic=topic, kind=AuditKind.OK, text=good)]


def _same_parameters(methods: Sequence[MethodSummary]) -> str:
    each = [f"{m.label} {count(m.parameters.mean)}" for m in methods if m.lr is not None]
    return f"Equal parameters up to what whole ranks leave over: {named(each, 8)}."


def _parameters(methods: Sequence[MethodSummary]) -> Iterator[str]:
    baseline = methods[0]
    unequal = []
    for method in methods[1:]:
        difference, share = method.parameters.difference, method.parameters.share
        if difference and not method.parameters.matched and method.lr is not None:
            relative = "" if share is None else f", {percent(share)}"
            unequal.append(f"{method.label} {count(method.parameters.mean)} ({signed(difference, 0)}{relative})")
    if unequal:
        yield (f"Unequal parameters. {baseline.label} has {count(baseline.parameters.mean)}; {joined(unequal)}.")
    for method in methods:
        least, most = method.parameters.least, method.parameters.most
        if least and most and most - least >= MATCHED_SHARE * most:
            yield (f"{method.label}: parameters differ between seeds, from {count(least)} to {count(most)}.")


def _training_parameters(used: Used) -> Iterator[str]:
    most: dict[str, tuple[float, int]] = {}
    times: dict[str, int] = {}
    for method, record in used:
        times[method.label] = int(record.metrics.get("trainings", 1))
        trained = record.metrics.get("training_parameters", 0.0)
        allowed = max(record.trainable_parameters, record.plan.get("budget") or 0)
        if trained > max(allowed, most.get(method.label, (0.0, 0))[0]):
            most[method.label] = (trained, record.trainable_parameters)
    for label, (trained, final) in most.items():
        yield (
            f"{label}: trained up to {count(trained)} parameters to end with {count(final)}; the "
            "comparison is at equal final parameters, not at equal training cost."
        )
    for label, number in times.items():
        if number > 1:
            yield f"{label}: trained {number} times a trial; only the last gives the weights."


def _failures(table: TrialTable, methods: Sequence[MethodSummary]) -> Iterator[str]:
    for method in methods:
        reasons = Counter(failure.reason for failure in method.failures)
        if reasons:
            listed = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
            yield f"{method.label}: {plural(reasons.total(), 'failed trial')}: {listed}."
        if method.lr is None:
            yield f"{method.label}: no seed finished, so it is not compared."
        elif method.missing_seeds:
            seeds = joined([str(seed) for seed in method.missing_seeds])
            yield (
                f"{method.label}: {len(method.missing_seeds)} of {len(table.seeds)} seeds missing "
                f"at its learning rate {method.lr:g} (seed {seeds}); pairs use the others."
            )


def _rates(table: TrialTable, methods: Sequence[MethodSummary]) -> Iterator[str]:
    grids: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for method in methods:
        grids[table.rates[method.label]].append(method.label)
    if len(grids) > 1:
        listed = "; ".join(
            f"{joined(names)}: {len(grid)} ({', '.join(f'{lr:g}' for lr in grid)})" for grid, names in grids.items()
        )
        yield f"Methods had different learning rates to choose from: {listed}."
    if max(len(grid) for grid in grids) == 1:
        yield ("One learning rate only: a method may look worse because its best rate is another one.")
    for method in methods:
        grid = table.rates[method.label]
        if len(grid) > 1 and method.lr in (grid[0], grid[-1]):
            end = "lowest" if method.lr == grid[0] else "highest"
            yield (
                f"{method.label}: its best learning rate {method.lr:g} is the {end} of the grid; "
                "a better one may lie outside."
            )


def _race(table: TrialTable) -> Iterator[AuditEntry]:
    """Say which rates a race stopped; nothing where there was none."""
    if not table.raced:
        return
    stopped = {m: sum(method == m for method, _ in table.raced) for m in table.methods}
    whole = [label for label, number in stopped.items() if not number]
    listed = "; ".join(f"{label}: {number} of {len(table.rates[label])}" for label, number in stopped.items())
    text = (
        f"Learning rates that fell behind were stopped on the way and not compared ({listed}), by "
        "their validation losses and one rule for all methods."
    )
    if whole:
        text += f" Of {named(whole)} no rate was stopped: their choice is from more trainings to the end."
    yield AuditEntry(topic="race", kind=AuditKind.BAD if whole else AuditKind.OK, text=text)


def _skipped(used: Used) -> Iterator[str]:
    steps: Counter[str] = Counter()
    for method, record in used:
        steps[method.label] += int(record.metrics.get("skipped_steps", 0))
    for label, number in steps.items():
        if number:
            yield f"{label}: {plural(number, 'training step')} skipped as not finite."


def _scaling(used: Used) -> Iterator[str]:
    """Yield a warning where factor x rank differs: Adam's first update of B·A grows with it."""
    sizes: dict[str, set[float]] = defaultdict(set)
    policies: dict[str, None] = {}  # in the order of the methods
    for method, record in used:
        if "sites" not in record.plan:
            continue  # no ranks
        policies[record.plan["scaling"]] = None
        sizes[method.label] |= {float(f"{site['step_size']:.4g}") for site in record.plan["sites"]}
    if len(set().union(*sizes.values())) > 1:
        listed = "; ".join(f"{label}: {_range(values)}" for label, values in sizes.items())
        names = joined([f"{policy} (factor {Scaling(policy).formula})" for policy in policies])
        yield (
            f"Factor x rank is not the same everywhere under scaling {names}: {listed}. Adam's "
            "first update grows with it, so rank and step size change together; a difference "
            "between methods may be one of learning rates."
        )


def _range(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _order(used: Used) -> AuditEntry:
    """Compare the digests of the batches that were learned from, seed by seed.

    Trials that early stopping ended have a shorter order and are no evidence against it.
    """
    digests: dict[tuple[int, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    known = 0
    for method, record in used:
        value = record.tags.get("order_digest")
        if value and not record.metrics.get("stopped_early"):
            known += 1
            digests[record.seed, record.fold][value].add(method.label)
    unequal = [key for key, orders in digests.items() if len(orders) > 1]
    if unequal:
        seed, fold = unequal[0]
        groups = " against ".join(named(sorted(who)) for who in digests[seed, fold].values())
        return AuditEntry(
            topic="data order",
            kind=AuditKind.BAD,
            text=f"Not every method learned from the same batches in the same order: "
            f"{plural(len(unequal), 'seed')} differ, such as seed {seed} ({groups}).",
        )
    if known < len(used):
        text = f"Data order: {len(used) - known} of {plural(len(used), 'trial')} did not record it"
        return AuditEntry(topic="data order", kind=AuditKind.UNKNOWN, text=f"{text} or stopped early.")
    return AuditEntry(
        topic="data order",
        kind=AuditKind.OK,
        text="Under each seed every method learned from the same batches in the same order.",
    )


def _together(used: Used) -> AuditEntry:
    """Compare among how many trials each was trained: a group shares its time and memory."""
    topic = "time and memory"
    groups: dict[int, set[str]] = defaultdict(set)
    for method, record in used:
        if (together := record.metrics.get("trials_together")) is not None:
            groups[int(together)].add(method.label)
    listed = {size: "alone" if size == 1 else f"among {size} trials at once" for size in sorted(groups)}
    if len(groups) > 1:
        sides = "; ".join(f"{text}: {named(sorted(groups[size]))}" for size, text in listed.items())
        text = (
            f"Not every trial was trained among as many others ({sides}): training times and peak "
            "memory do not compare, losses do."
        )
        return AuditEntry(topic=topic, kind=AuditKind.BAD, text=text)
    if sum("trials_together" in record.metrics for _, record in used) < len(used):
        text = "Time and memory: not every trial recorded whether it was trained alone."
        return AuditEntry(topic=topic, kind=AuditKind.UNKNOWN, text=text)
    text = f"Every trial was trained {next(iter(listed.values()))}, so times and memory compare."
    return AuditEntry(topic=topic, kind=AuditKind.OK, text=text)


def _tag(used: Used, tag: str, topic: str) -> AuditEntry:
    values: dict[str, set[str]] = defaultdict(set)
    absent = 0
    for method, record in used:
        value = record.tags.get(tag)
        if value is None:
            absent += 1
        else:
            values[value].add(method.label)
    if len(values) > 1:
        listed = "; ".join(f"{value}: {joined(sorted(who))}" for value, who in values.items())
        text = f"Trials differ in {topic}: {listed}."
        return AuditEntry(topic=topic, kind=AuditKind.BAD, text=text)
    if absent:
        text = f"{topic.capitalize()}: not recorded by {absent} of {plural(len(used), 'trial')}."
        return AuditEntry(topic=topic, kind=AuditKind.UNKNOWN, text=text)
    text = f"All trials have the same {topic}: {next(iter(values))}."
    return AuditEntry(topic=topic, kind=AuditKind.OK, text=text)


def _settings(used: Used) -> AuditEntry:
    """Compare the settings that trials of one study share, such as epochs and batch size."""
    free = {name for name, (_, field, _) in option_fields().items() if not field.metadata["identity"]}
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for method, record in used:
        for key, value in record.settings.items():
            name = key.removeprefix("cfg.")
            if key.startswith("cfg.") and name not in free:
                values[name][value].add(method.label)
    differing = {key: found for key, found in values.items() if len(found) > 1}
    if differing:
        listed = []
        for key, found in differing.items():
            sides = [f"{value} ({named(sorted(who))})" for value, who in found.items()]
            listed.append(f"{key}: {' against '.join(sides)}")
        text = f"Trials differ in settings: {'; '.join(listed)}."
        return AuditEntry(topic="settings", kind=AuditKind.BAD, text=text)
    if not values:
        text = "Settings: not recorded."
        return AuditEntry(topic="settings", kind=AuditKind.UNKNOWN, text=text)
    text = "All trials share their settings of data, training and evaluation."
    return AuditEntry(topic="settings", kind=AuditKind.OK, text=text)
