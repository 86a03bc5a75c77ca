"""Several tasks: their mean is compared, and beside it each task, corrected for all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptive_lora.analysis.comparison import inference
from adaptive_lora.analysis.comparison.compare import conclude, open_case
from adaptive_lora.analysis.comparison.inference import Rule
from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.analysis.comparison.types import Comparison, TaskResult
from adaptive_lora.results import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task that all methods were scored on."""

    name: str
    outcome: Outcome
    averaged: bool = True
    """Membership of the mean over tasks; of a task with several scores, one is a member."""


def compare_tasks(
    records: Sequence[TrialRecord], tasks: Mapping[int, Task], rule: Rule, facts: Mapping[str, str]
) -> tuple[Comparison, dict[str, Comparison]]:
    """Compare the mean over tasks, and each task.

    The mean gives every task the same weight, as folds have it within a seed. P-values of single
    tasks are corrected for all tasks and methods together.

    Args:
        records: trials, with the key of their task as fold.
        tasks: fold -> task.
        rule: level, correction, margin and unit of inference; its outcome is that of the mean.
        facts: how to reproduce, passed on as given.

    Returns:
        The comparison of the mean with a row per task and method, and the comparison of each task by its name.

    Raises:
        DataError: as `compare`.
    """
    own = {fold: [record for record in records if record.fold == fold] for fold in tasks}
    cases = {fold: open_case(own[fold], replace(rule, outcome=task.outcome)) for fold, task in tasks.items()}
    total = sum(len(case.pairs) for case in cases.values())
    cases = {fold: replace(case, rule=replace(case.rule, comparisons=total)) for fold, case in cases.items()}
    differences = {(fold, m): found for fold, case in cases.items() for m, found in case.differences().items()}
    replicates = {(fold, m): found for fold, case in cases.items() for m, found in case.replicates().items()}
    best = inference.correct(differences, replicates, rule.seed)
    parts = {
        fold: conclude(case, {label: best[fold, label] for label in case.pairs}, facts) for fold, case in cases.items()
    }
    mean = open_case([record for record in records if tasks[record.fold].averaged], rule)
    whole = conclude(mean, inference.correct(mean.differences(), mean.replicates(), rule.seed), facts)
    rows = tuple(
        TaskResult(
            task=tasks[fold].name,
            method=method.label,
            outcome=part.outcome,
            score=method.loss,
            baseline=part.methods[0].loss,
            difference=method.difference,
            p_corrected=part.deciding_p(method.difference),
            verdict=method.verdict,
        )
        for fold, part in parts.items()
        for method in part.methods
        if method.difference is not None
    )
    return replace(whole, tasks=rows), {tasks[fold].name: part for fold, part in parts.items()}
