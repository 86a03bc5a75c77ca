"""Rounds of a study that goes on until its comparisons are decided: trials, a look at the results, further seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from adaptive_lora.analysis.comparison import Comparison, Look, LookedAt, SeedPlan, VerdictKind, first_looks
from adaptive_lora.analysis.comparison.wording import plural
from adaptive_lora.config import StudyConfig, TrialSpec
from adaptive_lora.redaction import shown
from adaptive_lora.runner.comparison_input import comparison_input_of
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.recorded import LOOKS, LOOKS_TAG
from adaptive_lora.runner.result import compare_input
from adaptive_lora.runner.schedule import Leg, is_over
from adaptive_lora.tracking import StudyRun
from adaptive_lora.tracking.study_run import by_signature

_AWAY = " A look decides by the scores in the store: run the same command again when it answers."


def rounds_until_decided(
    context: StudyContext, study: StudyRun, progress: StudyProgress, first: Iterator[list[Leg]], trials: list[TrialSpec]
) -> Iterator[list[Leg]]:
    """Yield the legs of each look's seeds, for the baseline and the methods that are not decided.

    What a look decides depends on the scores in the store alone, so that an interrupted study goes on as if it had
    not been. A method keeps the learning rate that the first look chose.

    Args:
        context: context of the study.
        study: parent run of the study.
        progress: progress display.
        first: legs of the seeds that are given.
        trials: the trials of these; those of further seeds are added.

    Raises:
        TrackingError: the store does not answer at a look.
    """
    config, looks = context.config, context.config.seeds_by_look()
    yield from first
    if not config.race:  # which waits by itself
        yield from _awaited(context, study, trials)
    plan = SeedPlan(most=config.max_seeds, added=looks[:1])
    while True:
        study.store.settle(_AWAY)
        comparison = _compared(study, config, plan)
        look = _look(comparison, plan)
        plan = dataclasses.replace(plan, margin=comparison.margin, earlier=(*plan.earlier, look))
        study.json(LOOKS, plan.to_dict())
        study.tags({LOOKS_TAG: str(len(plan.added))})
        study.flush()
        progress.note(_told(look, plan))
        open_methods = [one.method for one in look.methods if one.verdict is VerdictKind.INCONCLUSIVE]
        number = len(plan.added)
        if not open_methods or number == len(looks):
            return
        plan = dataclasses.replace(plan, added=looks[: number + 1])
        further = _further(context, comparison, {comparison.baseline, *open_methods}, looks[number])
        trials += further
        progress.add(sum(context.signature(trial) not in study.finished_before for trial in further))
        yield from _awaited(context, study, further)


def _awaited(context: StudyContext, study: StudyRun, trials: Iterable[TrialSpec]) -> Iterator[list[Leg]]:
    """Yield the legs of trials that are not over, again and again until all are: workers ask while others train.

    Raises:
        TrackingError: the store does not answer.
    """
    trials = list(trials)
    while True:
        study.store.settle(_AWAY)
        runs = by_signature(study.children())
        own = [(trial, runs.get(context.signature(trial), [])) for trial in trials]
        legs = [Leg(trial=trial, earlier=found) for trial, found in own if not is_over(found, study.failed_before)]
        if not legs:
            return
        yield legs


def looks_lines(config: StudyConfig) -> list[str]:
    """Return when a study looks, and from which look on anything can be shown; empty for one with a fixed number."""
    if config.until != "decided":
        return []
    counts = config.seeds_at_looks()
    comparisons = len(config.methods) - 1
    difference, equivalence = first_looks(counts, comparisons)
    return [
        f"looks     at {', '.join(map(str, counts))} seeds; a difference can be shown at {difference} or more "
        f"({plural(comparisons, 'comparison')}), equivalence at {equivalence} or more"
    ]


def _compared(study: StudyRun, config: StudyConfig, plan: SeedPlan) -> Comparison:
    """Return the comparison at a look, with nothing written."""
    return compare_input(comparison_input_of(study, plan), config, config.baseline)


def _look(comparison: Comparison, plan: SeedPlan) -> Look:
    """Return what a look found of the methods that were open before it."""
    rows = [
        LookedAt(
            method=method.label,
            seeds=found.replicates,
            mean=found.mean,
            interval=found.interval,
            p=comparison.deciding_p(found),
            verdict=method.verdict.kind,
        )
        for method in comparison.methods
        if (found := method.difference) is not None
        and not any(earlier.decided(method.label) for earlier in plan.earlier)
    ]
    return Look(seeds=plan.added[-1], methods=tuple(rows))


def _further(context: StudyContext, comparison: Comparison, labels: set[str], seeds: Sequence[int]) -> list[TrialSpec]:
    """Return the trials of further seeds, each method at its chosen rate."""
    config = context.config
    rates = {method.label: method.lr for method in comparison.methods}
    return [
        TrialSpec(config=config, method=spec, seed=seed, fold=fold, lr=lr)
        for seed in seeds
        for fold in range(config.data.folds)
        for spec in config.specs
        if spec.label in labels and (lr := rates[spec.label]) is not None
    ]


def _told(look: Look, plan: SeedPlan) -> str:
    """Return a look in one line."""
    rows = ", ".join(
        f"{shown(one.method)} {'open' if one.verdict is VerdictKind.INCONCLUSIVE else one.verdict}"
        for one in look.methods
    )
    return f"look   {plural(plan.counts[-1], 'seed')} of at most {plan.most}: {rows}"
