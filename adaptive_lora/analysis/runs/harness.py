"""Runs of lm-evaluation-harness become trials: which tasks and scores are compared, on which examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaptive_lora.analysis.comparison import Outcome, Task
from adaptive_lora.analysis.comparison.wording import joined, named, plural
from adaptive_lora.analysis.runs.lm_eval import HarnessRun, Series, TaskSamples
from adaptive_lora.analysis.runs.rows import scored
from adaptive_lora.analysis.runs.types import Runs, direction, direction_text
from adaptive_lora.errors import ConfigError, DataError, unknown_name
from adaptive_lora.results import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Parts of the harness's output that are compared: tasks, filters, metrics."""

    tasks: tuple[str, ...] = ()
    """Names of tasks; empty: all."""
    filters: tuple[str, ...] = ()
    """Names of filters; empty: the first of each task."""
    metrics: tuple[str, ...] = ()
    """Names of metrics; empty: the first of each task that is a mean of its examples' scores."""
    higher_is_better: bool | None = None
    """Direction of all scores, where the tasks do not say it."""


def read_harness(runs: Sequence[HarnessRun], choice: Choice) -> Runs:
    """Return the runs as trials, one per run and score.

    Raises:
        ConfigError: a task, filter or metric that is asked for does not exist.
        DataError: the runs have no task in common, or asked different questions.
    """
    lines = [f"run {run.label}: {'; '.join([str(run.folder), *run.notes])}" for run in runs]
    tasks, left_out = _shared_tasks(runs, choice)
    lines += left_out
    _require_same_questions(runs, tasks)
    records: list[TrialRecord] = []
    found: dict[int, Task] = {}
    examples: dict[str, str] = {}
    for task in tasks:
        own = {run.label: run.tasks[task] for run in runs}
        chosen, unread = _chosen(task, list(own.values()), choice)
        if not chosen:
            lines.append(f"task {task}: left out, since none of its scores is a mean over its examples: {unread}")
            continue
        first = own[runs[0].label]
        settings = f"version {first.version}, {first.shots}-shot"
        for place, (_, name, metric) in enumerate(chosen):
            fold = len(found)
            outcome = Outcome(name=metric, unit="", higher_is_better=_higher(first, metric, choice))
            title = f"{task} {metric}" + (f" ({name})" if name != "none" else "")
            found[fold] = Task(name=title, outcome=outcome, averaged=place == 0)
            shared, lost = _shared_examples({run.label: run.tasks[task].scores[name, metric] for run in runs}, task)
            note = "" if place or not unread else f"; not compared: {unread}"
            lines.append(f"task {title}: {settings}, {direction_text(outcome)}; {lost}{note}")
            examples |= {example: first.texts.get(example, "") for example in shared}
            records += [_record(run, fold, run.tasks[task].scores[name, metric], shared) for run in runs]
    if not found:
        raise DataError(f"nothing of the lm-eval folders can be paired: {'; '.join(lines[len(runs) :])}.")
    return Runs(
        name=joined(tasks) if len(tasks) < 4 else plural(len(tasks), "task"),
        records=tuple(records),
        outcome=_mean_outcome(found, records),
        tasks=found if len(found) > 1 else {},
        baseline=runs[0].method,
        lines=tuple(lines),
        examples=examples,
    )


def _shared_tasks(runs: Sequence[HarnessRun], choice: Choice) -> tuple[list[str], list[str]]:
    """Return the tasks that all runs have, and lines about those that only some have."""
    names = list(dict.fromkeys(task for run in runs for task in run.tasks))
    for task in choice.tasks:
        if task not in names:
            raise ConfigError(unknown_name("task", task, names))
    asked = [task for task in names if not choice.tasks or task in choice.tasks]
    shared = [task for task in asked if all(task in run.tasks for run in runs)]
    lacking = {task: [run.label for run in runs if task not in run.tasks] for task in asked if task not in shared}
    if not shared:
        each = "; ".join(f"{run.label}: {named(list(run.tasks))}" for run in runs)
        raise DataError(f"the lm-eval folders have no task in common ({each}); required the same tasks of all runs.")
    lines = [f"task {task}: left out, since it is missing in {named(who)}" for task, who in lacking.items()]
    if other := [task for task in names if task not in asked]:
        lines.append(f"tasks not asked for: {named(other)}")
    return shared, lines


def _require_same_questions(runs: Sequence[HarnessRun], tasks: Iterable[str]) -> None:
    """Refuse runs that differ in what the model was asked, so that a difference may not be the method's."""
    differing = []
    for task in tasks:
        for what, read in (
            ("version", lambda samples: samples.version),
            ("number of few-shot examples", lambda samples: samples.shots),
            *((name, lambda samples, name=name: samples.settings[name]) for name in runs[0].tasks[task].settings),
        ):
            sides: dict[str, list[str]] = defaultdict(list)
            for run in runs:
                value = read(run.tasks[task])
                sides["none" if value is None else str(value)[:16]].append(run.label)
            if len(sides) > 1:
                listed = " against ".join(f"{value} ({named(who)})" for value, who in sides.items())
                differing.append(f"{what} of {task}: {listed}")
    if differing:
        raise DataError(
            f"the lm-eval folders cannot be compared, since the models were asked differently: {named(differing, 3)}. "
            "Run lm_eval with the same settings for all, or leave a task out by naming the others with --task."
        )


def _chosen(task: str, samples: Sequence[TaskSamples], choice: Choice) -> tuple[list[Series], str]:
    """Return the scores of a task that are compared, and the names of those that are not."""
    first, *others = samples
    keys = [key for key in first.scores if all(key in one.scores for one in others)]
    unusable = {key: reason for one in samples for key, reason in one.unusable.items()}
    filters = [name for name in choice.filters if any(name == own for own, _ in keys)]
    if choice.filters and not filters:
        raise ConfigError(f"task {task}: {unknown_name('filter', choice.filters[0], {name for name, _ in keys})}")
    usable = [key for key in keys if not filters or key[0] in filters]
    if missing := [metric for metric in choice.metrics if metric not in {metric for _, metric in usable}]:
        reasons = [f"{metric}: {reason}" for (_, metric), reason in unusable.items() if metric in missing]
        if len(missing) == len(choice.metrics):
            raise ConfigError(
                f"task {task}: {unknown_name('metric', missing[0], {metric for _, metric in usable})}"
                + (f" ({'; '.join(reasons)})" if reasons else "")
                + ". Name the tasks that have it with --task, or another metric."
            )
    if not usable:
        reasons = [f"{metric} ({name}), {reason}" for (name, metric), reason in unusable.items()]
        return [], "; ".join(reasons) or "the runs have none in common"
    names = filters or [usable[0][0]]
    metrics = [metric for metric in choice.metrics if metric not in missing] or [
        next(metric for name, metric in usable if name == names[0])
    ]
    chosen = [(task, name, metric) for metric in metrics for name in names if (name, metric) in usable]
    rest = [f"{metric} ({name})" for name, metric in keys if (task, name, metric) not in chosen]
    rest += [f"{metric} ({name}), {reason}" for (name, metric), reason in unusable.items()]
    return chosen, ", ".join(rest)


def _higher(samples: TaskSamples, metric: str, choice: Choice) -> bool:
    stated = samples.higher.get(metric)
    if stated is not None and choice.higher_is_better not in (None, stated):
        raise ConfigError(
            f"metric {metric}: its task says that {'higher' if stated else 'lower'} is better; leave the direction out."
        )
    return direction(metric, choice.higher_is_better if stated is None else stated)


def _shared_examples(scores: Mapping[str, Mapping[str, float]], task: str) -> tuple[list[str], str]:
    """Return the examples that all runs have, and how many there are and were left out.

    Raises:
        DataError: there is none.
    """
    own = {label: set(by_id) for label, by_id in scores.items()}
    shared = set.intersection(*own.values())
    if not shared:
        each = "; ".join(
            f"{label} has {len(by_id):,}, such as {named(sorted(by_id), 1)}" for label, by_id in own.items()
        )
        raise DataError(
            f"task {task}: the runs share no example (number and hash of the document): {each}. Required the same "
            "data for all."
        )
    first = next(iter(scores.values()))
    text = plural(len(shared), "example")
    if lost := set.union(*own.values()) - shared:
        who = named([f"{label} has {len(by_id):,}" for label, by_id in own.items()], 6)
        text += f", which all runs share; {len(lost):,} left out ({who})"
    return [name for name in first if name in shared], text


def _record(run: HarnessRun, fold: int, scores: Mapping[str, float], shared: Sequence[str]) -> TrialRecord:
    return TrialRecord(
        run_id=str(run.folder),
        method=run.method,
        seed=run.seed,
        fold=fold,
        lr=None,
        status="FINISHED",
        trainable_parameters=None,
        test=scored({example: scores[example] for example in shared}),
    )


def _mean_outcome(tasks: Mapping[int, Task], records: Sequence[TrialRecord]) -> Outcome:
    """Return the mean over tasks, or the score of the only one.

    Raises:
        DataError: their scores have no common direction or scale.
    """
    members = [task for task in tasks.values() if task.averaged]
    directions = {task.outcome.higher_is_better for task in members}
    if len(directions) > 1:
        listed = "; ".join(f"{task.name}: {direction_text(task.outcome)}" for task in members)
        raise DataError(
            f"the mean over these tasks means nothing, since their scores have different directions ({listed}). "
            "Compare those of one direction at a time, by --task or --metric."
        )
    if len(members) == 1:
        return Outcome(name=members[0].name, unit="", higher_is_better=directions.pop())
    names = {task.outcome.name for task in members}
    values = [(record.fold, record.test.nll_E) for record in records if record.test is not None]
    beyond = {tasks[fold].name: None for fold, score_E in values if score_E.min() < 0 or score_E.max() > 1}
    if len(names) > 1 and beyond:
        raise DataError(
            f"the mean over these tasks means nothing, since they have different scores and {named(list(beyond))} is "
            "not between 0 and 1. Compare those of one scale at a time, by --task or --metric."
        )
    what = names.pop() if len(names) == 1 else "score"
    return Outcome(name=f"{what} averaged over {len(members)} tasks", unit="", higher_is_better=directions.pop())
