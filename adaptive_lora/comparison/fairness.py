"""What makes a comparison less than fair, said before any result."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adaptive_lora.allocation import ScalePolicy
from adaptive_lora.comparison.trials import TrialTable
from adaptive_lora.comparison.types import MATCHED_SHARE, MethodSummary
from adaptive_lora.comparison.wording import count, joined, percent, plural, signed
from adaptive_lora.results import TrialRecord

COMPARED_TAGS = ("precision", "device", "data_digest", "base_hash", "code_version")
"""Tags that must not differ between trials that are compared."""

Tags = Mapping[str, Mapping[str, str]]


def audit(table: TrialTable, methods: Sequence[MethodSummary], tags: Tags) -> tuple[str, ...]:
    """Return every finding as a sentence.

    Args:
        table: the trials.
        methods: their summaries, baseline first.
        tags: run id -> tags, as far as known; `COMPARED_TAGS` are looked at.
    """
    used = [
        (method, record)
        for method in methods
        for folds in table.seeds_at(method.label, method.lr).values()
        for record in folds
    ]
    return tuple(
        [
            *_parameters(methods),
            *_training_parameters(used),
            *_failures(table, methods),
            *_rates(table, methods),
            *_skipped(used),
            *_scale(used),
            *_tags(used, tags),
        ]
    )


def _parameters(methods: Sequence[MethodSummary]) -> Iterator[str]:
    baseline = methods[0]
    unequal = []
    for method in methods[1:]:
        difference, share = method.parameters.difference, method.parameters.share
        if difference and not method.parameters.matched and method.lr is not None:
            relative = "" if share is None else f", {percent(share)}"
            unequal.append(
                f"{method.label} {count(method.parameters.mean)} "
                f"({signed(difference, 0)}{relative})"
            )
    if unequal:
        yield (
            f"Unequal parameters. {baseline.label} has {count(baseline.parameters.mean)}; "
            f"{joined(unequal)}."
        )
    for method in methods:
        least, most = method.parameters.least, method.parameters.most
        if least and most and most - least >= MATCHED_SHARE * most:
            yield (
                f"{method.label}: parameters differ between seeds, from "
                f"{count(least)} to {count(most)}."
            )


def _training_parameters(used: Iterable[tuple[MethodSummary, TrialRecord]]) -> Iterator[str]:
    most: dict[str, tuple[float, int]] = {}
    for method, record in used:
        trained = record.metrics.get("training_parameters", 0.0)
        if trained > max(record.trainable_parameters, most.get(method.label, (0.0, 0))[0]):
            most[method.label] = (trained, record.trainable_parameters)
    for label, (trained, final) in most.items():
        yield (
            f"{label}: trained up to {count(trained)} parameters to end with {count(final)}; the "
            "comparison is at equal final parameters, not at equal training cost."
        )


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
            f"{joined(names)}: {len(grid)} ({', '.join(f'{lr:g}' for lr in grid)})"
            for grid, names in grids.items()
        )
        yield f"Methods had different learning rates to choose from: {listed}."
    if max(len(grid) for grid in grids) == 1:
        yield (
            "One learning rate only: a method may look worse because its best rate is another one."
        )
    for method in methods:
        grid = table.rates[method.label]
        if len(grid) > 1 and method.lr in (grid[0], grid[-1]):
            end = "lowest" if method.lr == grid[0] else "highest"
            yield (
                f"{method.label}: its best learning rate {method.lr:g} is the {end} of the grid; "
                "a better one may lie outside."
            )


def _skipped(used: Iterable[tuple[MethodSummary, TrialRecord]]) -> Iterator[str]:
    steps: Counter[str] = Counter()
    for method, record in used:
        steps[method.label] += int(record.metrics.get("skipped_steps", 0))
    for label, number in steps.items():
        if number:
            yield f"{label}: {plural(number, 'training step')} skipped as not finite."


def _scale(used: Iterable[tuple[MethodSummary, TrialRecord]]) -> Iterator[str]:
    scales: dict[str, set[float]] = defaultdict(set)
    formulas: set[str] = set()
    for method, record in used:
        # Plans of before the policies had one: alpha / rank.
        policy = ScalePolicy(record.plan.get("scale_policy", ScalePolicy.CONSTANT_ALPHA_OVER_R))
        formulas.add(policy.formula)
        for site in record.plan.get("sites", ()):
            if site["rank"]:
                scale = policy.effective(float(site["alpha"]), int(site["rank"]))
                scales[method.label].add(round(scale, 6))
    if len(set().union(*scales.values())) > 1:
        listed = "; ".join(
            f"{label}: {joined([f'{scale:g}' for scale in sorted(values)])}"
            for label, values in scales.items()
        )
        yield (
            f"The scale {joined(sorted(formulas))} is not the same everywhere ({listed}): rank and "
            "step size change together."
        )


def _tags(used: Sequence[tuple[MethodSummary, TrialRecord]], tags: Tags) -> Iterator[str]:
    for name in COMPARED_TAGS:
        values: dict[str, set[str]] = defaultdict(set)
        for method, record in used:
            value = tags.get(record.run_id, {}).get(name)
            if value is not None:
                values[value].add(method.label)
        if len(values) > 1:
            listed = "; ".join(f"{value}: {joined(sorted(who))}" for value, who in values.items())
            yield f"Trials differ in {name.replace('_', ' ')}: {listed}."
