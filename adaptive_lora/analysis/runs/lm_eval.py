"""Output folders of lm-evaluation-harness, as `lm_eval --output_path FOLDER --log_samples` writes them.

A run's folder holds `results_DATE.json`, with scores, versions and settings of its tasks, and
`samples_TASK_DATE.jsonl`, with one line per example and filter. Source: EleutherAI/lm-evaluation-harness,
`lm_eval/loggers/evaluation_tracker.py` and `lm_eval/evaluator.py`, versions 0.4.4 to 0.4.13.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive_lora.analysis.comparison.wording import joined, named, plural
from adaptive_lora.errors import ConfigError, DataError, brief

_RESULTS = re.compile(r".*_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")
_NAMED = re.compile(r"(?P<method>[^=/\\]+?)(?::(?P<seed>\d{1,18}))?=(?P<folder>.+)")
_SEEDED = re.compile(r"(?P<method>.+?)[-_.]?seed[-_=]?(?P<seed>\d{1,18})", re.IGNORECASE)
_SETTINGS = {
    "chat template": "chat_template_sha",
    "system instruction": "system_instruction_sha",
    "few-shot examples as turns": "fewshot_as_multiturn",
}
"""Setting of a whole run that decides what the model is asked -> its key in the results."""
_BY_TASK = {
    "results": True,
    "n-samples": True,
    "higher_is_better": True,
    "versions": False,
    "n-shot": False,
    "group_subtasks": False,
}
"""Key of the results that holds values by task -> whether these are objects."""
_TEXT = 300
"""Number of characters of a prompt that the report shows: its end, where the question is."""

Series = tuple[str, str, str]
"""Task, filter and metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSamples:
    """One task of a run: its settings, and the scores of its examples."""

    version: Any
    shots: Any
    settings: Mapping[str, Any]
    """Settings of the run that decide what the model is asked."""
    scores: Mapping[tuple[str, str], Mapping[str, float]]
    """(filter, metric) -> example id -> score, in the harness's order; only of metrics that are means of examples."""
    unusable: Mapping[tuple[str, str], str]
    """(filter, metric) -> reason why it is not compared."""
    higher: Mapping[str, bool | None]
    """Metric -> whether more is better, as the task says."""
    texts: Mapping[str, str]
    """Example id -> end of its prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessRun:
    """One run of the harness."""

    method: str
    seed: int
    folder: Path
    tasks: Mapping[str, TaskSamples]
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Method and seed, for messages."""
        return f"{self.method}, seed {self.seed}"


def find_runs(places: Sequence[str]) -> list[HarnessRun]:
    """Return the runs of folders.

    A place is `NAME=FOLDER`, `NAME:SEED=FOLDER` or a folder. The name of a folder alone gives method
    and seed: `NAME-seed3` is seed 3 of NAME, any other name is a method with seed 0. It is the folder
    that is given, or, where that holds the results of several models, the folder of each model.

    Raises:
        ConfigError: two places are one method and seed, or a name is given to several models.
        DataError: a folder has no results or no samples, or a file is broken.
    """
    runs: dict[tuple[str, int], HarnessRun] = {}
    for place in places:
        for method, seed, folder in _named_folders(place):
            if (method, seed) in runs:
                raise ConfigError(
                    f"two folders are method {method}, seed {seed}: {runs[method, seed].folder} and {folder}; name "
                    "them apart, such as --lm-eval NAME:SEED=FOLDER."
                )
            runs[method, seed] = _read_run(method, seed, folder)
    return list(runs.values())


def _named_folders(place: str) -> Iterator[tuple[str, int, Path]]:
    match = None if Path(place).exists() else _NAMED.fullmatch(place)
    folder = Path(match["folder"] if match else place).expanduser()
    if not folder.is_dir():
        raise DataError(f"lm-eval folder {folder} does not exist; required FOLDER, NAME=FOLDER or NAME:SEED=FOLDER.")
    homes = [folder] if _dates(folder) else sorted(sub for sub in folder.iterdir() if sub.is_dir() and _dates(sub))
    if not homes:
        raise DataError(
            f"lm-eval folder {folder} has no results_DATE.json, nor has a folder in it; required the output of "
            "`lm_eval --output_path FOLDER --log_samples`."
        )
    if match:
        if len(homes) > 1:
            models = joined([home.name for home in homes])
            raise ConfigError(
                f"{place}: {folder} holds the results of {models}; name one: {match['method']}={homes[0]}."
            )
        yield match["method"], int(match["seed"] or 0), homes[0]
        return
    for home in homes:
        name = (home if len(homes) > 1 else folder).resolve().name
        seeded = _SEEDED.fullmatch(name)
        yield (seeded["method"], int(seeded["seed"]), home) if seeded else (name, 0, home)


def _dates(folder: Path) -> dict[str, Path]:
    """Return date -> file of results, oldest first."""
    found = {match[1]: path for path in folder.iterdir() if (match := _RESULTS.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _read_run(method: str, seed: int, folder: Path) -> HarnessRun:
    """Read the newest samples of every task."""
    files: dict[str, tuple[Mapping[str, Any], Path]] = {}
    older: list[str] = []
    without: set[str] = set()
    for date, path in _dates(folder).items():
        results = _results(path)
        groups = {name for name, members in (results.get("group_subtasks") or {}).items() if members}
        for task in results["results"]:
            samples = folder / f"samples_{task}_{date}.jsonl"
            if samples.is_file():
                older += [task] if task in files else []
                files[task] = results, samples
            elif task not in groups:
                without.add(task)
    if not files:
        raise DataError(
            f"lm-eval folder {folder} has results of {named(sorted(without)) or 'no task'} and no "
            "samples_TASK_DATE.jsonl beside them; run lm_eval with --log_samples, since only scores of single examples "
            "can be paired."
        )
    notes = []
    if older:
        notes.append(f"earlier results not used: {plural(len(older), 'file')} of {named(sorted(set(older)))}")
    if absent := sorted(without - set(files)):
        notes.append(f"tasks without samples: {named(absent)}")
    tasks = {task: _read_task(task, results, samples) for task, (results, samples) in files.items()}
    return HarnessRun(method=method, seed=seed, folder=folder, tasks=tasks, notes=tuple(notes))


def _results(path: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {brief(error)}") from error
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise DataError(f"{path}: required the results of lm-evaluation-harness, a JSON object with the key results.")
    for key in _BY_TASK:
        by_task = results.get(key)
        nested = by_task.values() if isinstance(by_task, dict) and _BY_TASK[key] else ()
        if not isinstance(by_task, dict | None) or not all(isinstance(value, dict | None) for value in nested):
            raise DataError(
                f"{path}, {key}: required an object with {'an object' if _BY_TASK[key] else 'a value'} per task, as "
                f"lm-evaluation-harness writes it, got {by_task!r:.80}."
            )
    return results


@dataclass(slots=True)
class _Read:
    """Scores of one task while its lines are read."""

    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    unusable: dict[tuple[str, str], str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def _read_task(task: str, results: Mapping[str, Any], path: Path) -> TaskSamples:
    """Read the samples of one task, and check them against its results."""
    summary: Mapping[str, Any] = results["results"][task] or {}
    known = list(dict.fromkeys(name.partition(",")[::2] for name in summary if "," in name and "_stderr," not in name))
    read = _Read()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                _add(read, _sample(line, path, number), known, f"{path}, line {number}")
    if not read.scores:
        raise DataError(f"{path} has no scores of examples; required one JSON object per example.")
    counts = {len(scores) for scores in read.scores.values()}
    expected = ((results.get("n-samples") or {}).get(task) or {}).get("effective")
    if expected is not None and counts != {expected}:
        raise DataError(
            f"{path} has {joined([f'{count:,}' for count in sorted(counts)])} examples a filter and metric, and its "
            f"results {expected:,}: the file is not whole, or not of these results."
        )
    for (name, metric), scores in read.scores.items():
        stated, mean = summary.get(f"{metric},{name}"), sum(scores.values()) / len(scores)
        if (name, metric) in read.unusable:
            continue
        if isinstance(stated, int | float) and not math.isclose(stated, mean, rel_tol=1e-5, abs_tol=1e-9):
            read.unusable[name, metric] = f"its result {stated:.6g} is no mean of its examples' scores ({mean:.6g})"
    higher = (results.get("higher_is_better") or {}).get(task) or {}
    return TaskSamples(
        version=(results.get("versions") or {}).get(task),
        shots=(results.get("n-shot") or {}).get(task),
        settings={what: results.get(key) for what, key in _SETTINGS.items()},
        scores={key: scores for key, scores in read.scores.items() if key not in read.unusable},
        unusable=read.unusable,
        higher={metric: higher.get(metric) for _, metric in read.scores},
        texts=read.texts,
    )


def _sample(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        sample = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({brief(error)}).") from error
    if not isinstance(sample, dict) or "doc_id" not in sample or "doc_hash" not in sample:
        raise DataError(
            f"{path}, line {number}: required a sample with doc_id and doc_hash, as lm-evaluation-harness writes it "
            "from version 0.4.4."
        )
    return sample


def _add(read: _Read, sample: Mapping[str, Any], known: Sequence[tuple[str, str]], where: str) -> None:
    """Add the scores of one line: an example under one filter."""
    filters = list(dict.fromkeys(name for _, name in known))
    name = sample.get("filter", filters[0] if len(filters) == 1 else None)
    if name is None:
        raise DataError(
            f"{where}: names no filter, and its task has {joined(filters) or 'none'}; required samples of "
            "lm-evaluation-harness from version 0.4.7, which say which filter they are of."
        )
    example = f"{sample['doc_id']}:{str(sample['doc_hash'])[:12]}"
    metrics = sample.get("metrics") or [metric for metric, of in known if of == name and metric in sample]
    if not isinstance(metrics, list) or not all(isinstance(metric, str) for metric in metrics):
        raise DataError(f"{where}, metrics: required a list of names, got {metrics!r:.80}.")
    for metric in metrics:
        value, key = sample.get(metric), (str(name), metric)
        if example in read.scores[key]:
            raise DataError(f"{where}: example {example} is given twice for filter {name}; required one line each.")
        if not isinstance(value, int | float) or not math.isfinite(value):
            read.unusable.setdefault(key, f"its examples have {value!r:.40} in place of one finite number")
            value = 0.0
        read.scores[key][example] = float(value)
    if example not in read.texts:
        arguments = sample.get("arguments")
        first = arguments.get("gen_args_0") if isinstance(arguments, dict) else None
        prompt = first.get("arg_0") if isinstance(first, dict) else None
        read.texts[example] = prompt[-_TEXT:] if isinstance(prompt, str) else ""
