"""`compare` of the public API: the verdict on runs that were made elsewhere."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, cast, get_args

from adaptive_lora import __version__
from adaptive_lora.analysis.comparison import Comparison, compare_tasks
from adaptive_lora.analysis.comparison import compare as compare_trials
from adaptive_lora.analysis.comparison.inference import Rule
from adaptive_lora.analysis.comparison.outcome import Margin, Replicate
from adaptive_lora.analysis.comparison.wording import joined, named, plural
from adaptive_lora.analysis.report.formats import About
from adaptive_lora.analysis.report.result import ComparisonResult
from adaptive_lora.analysis.runs import sources
from adaptive_lora.analysis.runs.harness import Choice, read_harness
from adaptive_lora.analysis.runs.lm_eval import find_runs
from adaptive_lora.analysis.runs.rows import Rows, read_rows
from adaptive_lora.analysis.runs.types import Runs
from adaptive_lora.analysis.stats import Correction
from adaptive_lora.config import TrackingConfig, digest
from adaptive_lora.errors import ConfigError, DataError, unknown_name
from adaptive_lora.results import TrialRecord


def compare(
    runs: Any,
    *,
    baseline: str | None = None,
    columns: Mapping[str, str] | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    correction: str = "holm",
    tasks: Sequence[str] = (),
    filters: Sequence[str] = (),
    metrics: Sequence[str] = (),
    output: str | Path | None = None,
) -> ComparisonResult:
    """Compare methods by runs that were made elsewhere, paired by seed, or by example where there is one run each.

    Args:
        runs: one of: a pandas data frame or a list of dictionaries, with a row a run, or a row an example of
            a run; the path of such a table (CSV, TSV, JSON, JSON Lines, Parquet); a list of MLflow's `Run`
            or the data frame of `mlflow.search_runs`; a folder, or a list of folders, of lm-evaluation-harness,
            each as `FOLDER`, `NAME=FOLDER` or `NAME:SEED=FOLDER`.
        baseline: method that the others are compared with. None: that of the first folder of lm-eval;
            of a table it must be named.
        columns: role -> column of a table that has another name. Roles: `method`, `seed`, `score` and, if
            there are such columns, `example`, `budget` (trainable parameters), `rate` (learning rate) and
            `validation` (score by which one of several rates is chosen).
        higher_is_better: direction of the score, where neither its name nor its lm-eval task says it.
        margin: largest difference that does not matter, in the unit of the score; None: equivalence is not tested.
        correction: p-value that decides, corrected for all comparisons: `holm`, `max_t` or `benjamini_hochberg`.
        tasks: lm-eval tasks to compare; none: all that the runs share.
        filters: lm-eval filters; none: the first of each task.
        metrics: lm-eval metrics; none: the first of each task that is a mean over its examples.
        output: folder for reports; None: `adaptive-lora-out`.

    Returns:
        Verdict, table and report. Nothing is written until `report()` is called.

    Raises:
        ConfigError: an argument is missing, unknown, or does not fit the runs.
        DataError: the runs cannot be read, or nothing can be paired.
    """
    if correction not in get_args(Correction):
        raise ConfigError(unknown_name("correction", correction, get_args(Correction)))
    if higher_is_better not in (None, True, False):
        raise ConfigError(f"higher_is_better must be True, False or None; got {higher_is_better!r}.")
    if not isinstance(margin, Real | None):
        raise ConfigError(f"margin: required a number, got {margin!r}.")
    choice = Choice(
        tasks=tuple(tasks), filters=tuple(filters), metrics=tuple(metrics), higher_is_better=higher_is_better
    )
    found = _read(runs, columns or {}, choice)
    label = found.baseline if baseline is None else str(baseline)  # methods of a table can be numbers
    methods = list(dict.fromkeys(record.method for record in found.records))
    if len(methods) < 2:
        raise DataError(f"required runs of two methods or more, got one: {joined(methods)}.")
    if label is None:
        raise ConfigError(f"required the baseline (--baseline), one of: {', '.join(methods)}; none was given.")
    if label not in methods:
        raise ConfigError(unknown_name("baseline", label, methods))
    over, notes = _unit_of_inference(found, label)
    rule = Rule(
        baseline=label,
        alpha=0.05,
        confidence=0.95,
        correction=cast(Correction, correction),
        comparisons=0,
        margin=Margin(value=margin, source=""),
        outcome=found.outcome,
        over=over,
    )
    lines = (*found.lines, *notes, f"baseline: {label}" + ("" if baseline is not None else ", of the first folder"))
    return _result(found, rule, lines, Path(output or TrackingConfig().output))


def _read(runs: Any, columns: Mapping[str, str], choice: Choice) -> Runs:
    """Return the runs of any source."""
    if isinstance(runs, str | Path):
        runs = [runs] if "=" in str(runs) or Path(runs).is_dir() else sources.file_rows(Path(runs))
    elif sources.is_frame(runs):
        runs = sources.frame_rows(runs)
    elif not isinstance(runs, Sequence) or isinstance(runs, bytes):
        raise ConfigError(
            "runs: required a data frame, a list of dictionaries, a path, a list of lm-eval folders, or a list of "
            f"MLflow runs, got {type(runs).__name__}."
        )
    elif runs and all(isinstance(item, str | Path) for item in runs):
        runs = list(runs)
    elif runs and all(map(sources.is_run, runs)):
        runs = sources.mlflow_rows(runs)
    else:
        runs = sources.dictionaries(runs)
    if isinstance(runs, Rows):
        _refuse("a table or MLflow runs", tasks=choice.tasks, filters=choice.filters, metrics=choice.metrics)
        if not runs.list_unread:
            runs = sources.usable_mlflow(runs, columns)
        return read_rows(runs, columns, choice.higher_is_better)
    _refuse("lm-eval folders", columns=columns)
    return read_harness(find_runs([str(place) for place in runs]), choice)


def _refuse(source: str, **given: Any) -> None:
    """Refuse arguments that are not for a source."""
    if names := [name for name, value in given.items() if value]:
        raise ConfigError(f"{joined(names)}: not for {source}; leave it out.")


def _unit_of_inference(found: Runs, baseline: str) -> tuple[Replicate, list[str]]:
    """Return seeds, or examples where every method has one run; and lines on what cannot be paired.

    Raises:
        DataError: nothing can be paired or tested.
    """
    seeds: dict[str, set[int]] = defaultdict(set)
    for record in found.records:
        seeds[record.method].add(record.seed)
    others = {method: own for method, own in seeds.items() if method != baseline}
    paired = {method: own & seeds[baseline] for method, own in others.items()}
    if not any(paired.values()):
        each = "; ".join(f"{method}: {named(sorted(map(str, own)), 6)}" for method, own in seeds.items())
        raise DataError(
            f"no method shares a seed with the baseline {baseline} (seeds of {each}), so nothing can be paired. Runs "
            "of one seed share data order and initialisation; of one run per method, give all the same seed."
        )
    lines = []
    for method in others:
        for who, lacking in ((method, baseline), (baseline, method)):
            if alone := seeds[who] - seeds[lacking]:
                lines.append(
                    f"not paired: {plural(len(alone), 'seed')} that {who} has and {lacking} lacks "
                    f"({named([str(seed) for seed in sorted(alone)], 6)})"
                )
    if max(map(len, paired.values())) > 1:
        return "seed", [*lines, "unit of inference: the seed"]
    if all(record.test is not None and len(record.test.example_ids) == 1 for record in found.records):
        raise DataError(
            "one paired seed and no scores of single examples: nothing can be tested with one number per method. "
            "Required two seeds or more (five for p under 0.1), or a column with the example that a score is of."
        )
    return "example", [*lines, "unit of inference: the test example, since one run of each method is paired"]


def _result(found: Runs, rule: Rule, lines: tuple[str, ...], output: Path) -> ComparisonResult:
    facts = {
        "adaptive_lora": __version__,
        "runs": found.name,
        "score": found.outcome.name,
        "correction": rule.correction,
    }
    parts: dict[str, Comparison] = {}
    if found.tasks:
        comparison, parts = compare_tasks(found.records, found.tasks, rule, facts)
        used = [record for record in found.records if found.tasks[record.fold].averaged]
    else:
        comparison = compare_trials(
            found.records,
            baseline=rule.baseline,
            margin=rule.margin.value,
            confidence=rule.confidence,
            correction=rule.correction,
            facts=facts,
            outcome=rule.outcome,
            over=rule.over,
        )
        used = list(found.records)
    key = digest({"lines": lines, "scores": [record.test.loss for record in found.records if record.test]})[:10]
    folder = output / f"compare-{key}"

    def made(comparison: Comparison, records: Sequence[TrialRecord], title: str, folder: Path) -> ComparisonResult:
        about = About(title=title, examples=found.examples, data={found.name: lines})
        return ComparisonResult(comparison=comparison, records=tuple(records), about=about, folder=folder)

    whole = made(comparison, used, f"Comparison of {found.name}", folder)
    own: dict[str, ComparisonResult] = {}
    for fold, task in found.tasks.items():
        records = [record for record in found.records if record.fold == fold]
        own[task.name] = made(parts[task.name], records, f"Comparison of {task.name}", folder / f"task-{fold}")
    return dataclasses.replace(whole, tasks=own)
