"""Rows of a table, each a run or an example of a run, become trials."""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptive_lora.analysis.comparison import Outcome
from adaptive_lora.analysis.comparison.wording import named, plural
from adaptive_lora.analysis.runs.types import Runs, direction, direction_text
from adaptive_lora.errors import ConfigError, DataError, unknown_name
from adaptive_lora.results import EvalResult, TrialRecord

ROLES = {
    "method": "name of the method",
    "seed": "seed of the run",
    "score": "the number that is compared",
    "example": "id of a test example, where a row is one example of a run",
    "budget": "trainable parameters",
    "rate": "learning rate",
    "validation": "score of the run on validation data, by which a learning rate is chosen",
}
"""Role of a column -> its meaning; the first three are required, `seed` only without `example`."""
_RUN = ("budget", "rate", "validation")
"""Roles that have one value a run."""
WHOLE = "whole"
"""Example id of a score that is of the whole test part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows as read, before any meaning."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    """Place of each row, such as `line 12`."""
    lines: tuple[str, ...] = ()
    """How they were read, for people."""
    list_unread: bool = True
    """Mark of a table whose columns without a role are named; MLflow runs have too many."""


@dataclass(kw_only=True, slots=True)
class _Run:
    """Scores of one method, seed and learning rate, as rows give them."""

    place: str
    scores: dict[str, float] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)
    """Role -> value, of the roles that have one value a run."""


_Key = tuple[str, int, float | None]
"""Method, seed and learning rate of a run."""


def read_rows(table: Rows, columns: Mapping[str, str], higher_is_better: bool | None) -> Runs:
    """Return the runs of a table.

    Args:
        table: the rows.
        columns: role -> name of its column, where that is another one than the role.
        higher_is_better: direction of the score; None: by its name.

    Raises:
        ConfigError: an unknown role, or a direction that is not known.
        DataError: a column is missing; a value is no number, not finite or missing; a run or example is
            given twice; runs of a method have several learning rates without validation scores.
    """
    found = _columns(table, columns)
    outcome = Outcome(
        name=found["score"], unit="", higher_is_better=direction(columns.get("score", found["score"]), higher_is_better)
    )
    runs = _grouped(table, found)
    _require_chosen_rates(runs)
    whole = "example" not in found
    kept, lost = ({key: run.scores for key, run in runs.items()}, "") if whole else _shared_examples(runs)
    records = tuple(_record(key, runs[key], scores) for key, scores in kept.items())
    read = ", ".join(role if role == name else f"{role} ({name})" for role, name in found.items())
    unread = [name for name in _names(table) if name not in found.values()]
    lines = [*table.lines, f"columns read: {read}"]
    if unread and table.list_unread:
        lines.append(f"columns not read: {', '.join(unread)}")
    lines.append(f"score: {direction_text(outcome)}")
    lines.append(f"runs: {_counted(records)}")
    lines += _incomplete_rates(runs)
    if "seed" not in found:
        lines.append("seeds: no such column, so each method has one run")
    if not whole:
        lines.append(f"examples: {lost}")
    return Runs(name=table.name, records=records, outcome=outcome, lines=tuple(lines))


def _names(table: Rows) -> list[str]:
    return list(dict.fromkeys(str(name) for row in table.rows for name in row))


def _columns(table: Rows, columns: Mapping[str, str]) -> dict[str, str]:
    """Return role -> column, of the roles that the table has."""
    for role in columns:
        if role not in ROLES:
            raise ConfigError(f"columns: {unknown_name('role', role, ROLES)}")
    names = _names(table)
    if not names:
        raise DataError(f"{table.name} has no rows; required one row a run.")
    for role, name in columns.items():
        if name not in names:
            raise DataError(f"{table.name}: {role}: {unknown_name('column', name, names)}")
    if "validation" in columns and columns["validation"] == columns.get("score", "score"):
        raise ConfigError(
            f"columns: validation and score are both '{columns['validation']}': the best rate by the compared score "
            "would be chosen on what it is judged by. Required a column with a score on other data."
        )
    taken = set(columns.values())
    found = {
        role: columns.get(role, role) for role in ROLES if role in columns or (role in names and role not in taken)
    }
    required = ["method", "score", *([] if "example" in found else ["seed"])]
    if missing := [role for role in required if role not in found]:
        raise DataError(
            f"{table.name} has no column {' and no column '.join(missing)} (its columns: {', '.join(names)}); "
            f"required {', '.join(f'{role} ({ROLES[role]})' for role in missing)}. Name a column of yours with "
            f"--columns {','.join(f'{role}=NAME' for role in missing)}."
        )
    return found


def _grouped(table: Rows, found: Mapping[str, str]) -> dict[_Key, _Run]:
    """Return the runs in the order in which rows name them."""
    runs: dict[_Key, _Run] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for row, place in zip(table.rows, table.places, strict=True):
        where = f"{table.name}, {place}"
        method = _method(row.get(found["method"]), where, found["method"], kinds)
        seed = _seed(row.get(found["seed"]), where, found["seed"]) if "seed" in found else 0
        values = {role: _run_value(role, row, found, where) for role in _RUN}
        example = _example(row.get(found["example"]), where, found["example"]) if "example" in found else WHOLE
        score = _number(row.get(found["score"]), where, found["score"])
        run = runs.setdefault((method, seed, values["rate"]), _Run(place=place, values=values))
        if example in run.scores:
            what = "" if example == WHOLE else f", example {example}"
            raise DataError(
                f"{table.name}: two rows of one run (method {method}, seed {seed}{what}): {run.places[example]} and "
                f"{place}; required one row {'a run' if example == WHOLE else 'an example'}. Several runs of a "
                "method need seeds of their own."
            )
        for role in ("budget", "validation"):
            if run.values[role] != values[role]:
                raise DataError(
                    f"{where}: {found[role]} {values[role]} differs from {run.values[role]} in {run.place}, a row of "
                    f"the same run (method {method}, seed {seed}); required one value a run."
                )
        run.scores[example], run.places[example] = score, place
    return runs


def _run_value(role: str, row: Mapping[str, Any], found: Mapping[str, str], where: str) -> float | None:
    """Return budget, rate or validation score; None where the table has no such column, or the cell is empty."""
    if role not in found or _is_missing(row.get(found[role])):
        return None
    value = _number(row[found[role]], where, found[role])
    if role == "budget" and (value <= 0 or value != int(value)):
        raise DataError(f"{where}, column {found[role]}: required a whole number of parameters above 0, got {value:g}.")
    if role == "rate" and value <= 0:
        raise DataError(f"{where}, column {found[role]}: required a learning rate above 0, got {value:g}.")
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _method(value: Any, where: str, column: str, kinds: dict[str, tuple[str, str]]) -> str:
    """Return a method's name; a number is named as it is written, and is no other method than the same text."""
    if _is_missing(value):
        raise DataError(f"{where}, column {column}: required the name of a method, got an empty cell.")
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise DataError(f"{where}, column {column}: required the name of a method, got {value!r:.80}.")
    name = _written(value)
    kind = "text" if isinstance(value, str) else "a number"
    before, place = kinds.setdefault(name, (kind, where))
    if before != kind:
        raise DataError(
            f"{where}, column {column}: method {name} is {kind} here and {before} in {place}; required one type."
        )
    return name


def _example(value: Any, where: str, column: str) -> str:
    if _is_missing(value) or isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise DataError(f"{where}, column {column}: required an example's id, got {value!r:.80}.")
    return _written(value)


def _written(value: str | numbers.Real) -> str:
    """Return a name as it is written; of a number all digits, and no point where it is whole."""
    return value.strip() if isinstance(value, str) else str(value).removesuffix(".0")


def _seed(value: Any, where: str, column: str) -> int:
    """Return a seed; a whole number however it is written."""
    try:
        written = value.strip().removesuffix(".0") if isinstance(value, str) else value
        seed = None if isinstance(value, bool) else int(written)
    except (TypeError, ValueError, OverflowError):
        seed = None
    if seed is None or (not isinstance(value, str) and seed != value) or not -(2**63) <= seed < 2**63:
        raise DataError(f"{where}, column {column}: required a whole number of at most 64 bits, got {value!r:.80}.")
    return seed


def _number(value: Any, where: str, column: str) -> float:
    """Return a finite number."""
    if _is_missing(value):
        got = "NaN" if isinstance(value, float) else "an empty cell"
        raise DataError(
            f"{where}, column {column}: required a number, got {got}. A run without a score is left out by leaving out "
            "its row: it then counts as missing."
        )
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        hint = ""
        if isinstance(value, str) and value.count(",") == 1 and value.replace(",", "").strip("-+ ").isdigit():
            hint = "; write a decimal point"
        elif isinstance(value, str) and value.strip().endswith("%"):
            hint = "; write a share without the sign"
        raise DataError(f"{where}, column {column}: required a number, got {value!r:.80}{hint}.") from None
    if not math.isfinite(number):
        raise DataError(f"{where}, column {column}: required a finite number, got {value!r:.80}.")
    return number


def _require_chosen_rates(runs: Mapping[_Key, _Run]) -> None:
    """Refuse several learning rates of one method without validation scores to choose by."""
    rates: dict[str, set[float | None]] = defaultdict(set)
    for method, _, rate in runs:
        rates[method].add(rate)
    for method, tried in rates.items():
        own = [run for (name, _, _), run in runs.items() if name == method]
        if len(tried) > 1 and None in tried:
            raise DataError(f"method {method}: only some of its runs have a learning rate; required all or none.")
        if len(tried) > 1 and any(run.values["validation"] is None for run in own):
            raise DataError(
                f"method {method} has {len(tried)} learning rates and no validation score for each of its runs: the "
                "best rate by the compared score would be chosen on what it is judged by. Give a column of "
                "validation scores (--columns validation=NAME), or keep the runs of one rate chosen without it."
            )


def _incomplete_rates(runs: Iterable[_Key]) -> list[str]:
    """Return a line for every learning rate that has fewer seeds than another of its method."""
    seeds: dict[str, dict[float | None, int]] = defaultdict(lambda: defaultdict(int))
    for method, _, rate in runs:
        seeds[method][rate] += 1
    return [
        f"rate {rate:g} of {method}: {number} of {plural(max(own.values()), 'seed')}, so it is not chosen"
        for method, own in seeds.items()
        for rate, number in own.items()
        if rate is not None and number < max(own.values())
    ]


def _shared_examples(runs: Mapping[_Key, _Run]) -> tuple[dict[_Key, dict[str, float]], str]:
    """Return the scores on the examples that all runs of a seed share, and how many others there were.

    Raises:
        DataError: the runs of a seed share none.
    """
    by_seed: dict[int, list[_Key]] = defaultdict(list)
    for key in runs:
        by_seed[key[1]].append(key)
    kept: dict[_Key, dict[str, float]] = {}
    lost: set[str] = set()
    for seed, keys in by_seed.items():
        shared = set.intersection(*(set(runs[key].scores) for key in keys))
        if not shared:
            raise DataError(
                f"the runs of seed {seed} share no example: "
                + "; ".join(f"{key[0]} has {named(list(runs[key].scores), 3)}" for key in keys)
                + ". Required the same test examples for all methods."
            )
        for key in keys:
            lost |= set(runs[key].scores) - shared
            kept[key] = {name: score for name, score in runs[key].scores.items() if name in shared}
    ordered = {key: kept[key] for key in runs}
    most, least = (pick(map(len, kept.values())) for pick in (max, min))
    text = f"{most:,} a run" if most == least else f"{least:,} to {most:,} a run"
    if lost:
        names = named(sorted(lost), 3)
        text += f"; left out, since not every run of the seed has them: {plural(len(lost), 'example')} ({names})"
    return ordered, text


def _record(key: _Key, run: _Run, scores: Mapping[str, float]) -> TrialRecord:
    method, seed, rate = key
    budget, validation = run.values["budget"], run.values["validation"]
    return TrialRecord(
        run_id=run.place,
        method=method,
        seed=seed,
        fold=0,
        lr=rate,
        status="FINISHED",
        trainable_parameters=None if budget is None else int(budget),
        validation_loss=math.nan if validation is None else validation,
        test=scored(scores),
    )


def scored(scores: Mapping[str, float]) -> EvalResult:
    """Return scores by example as those of a trial: the mean takes the place of the loss."""
    return EvalResult(
        example_ids=tuple(scores),
        nll_E=np.fromiter(scores.values(), dtype=np.float64, count=len(scores)),
        tokens_E=np.ones(len(scores), dtype=np.int64),
        correct_E=None,
        unit="",
    )


def _counted(records: Sequence[TrialRecord]) -> str:
    """Return runs by method, such as "5 of 2 methods: uniform (3), waterfill (2)"."""
    numbers_of: dict[str, int] = defaultdict(int)
    for record in records:
        numbers_of[record.method] += 1
    each = ", ".join(f"{name} ({number})" for name, number in numbers_of.items())
    return f"{len(records)} of {plural(len(numbers_of), 'method')}: {each}"
