"""The tables of a comparison, made once and shown in terminal, Markdown, LaTeX and page.

`tables.yaml` describes them: the result is the answer; the checks are the failed trials and the fairness
audit; more tables are the statistics beside the answer, which Markdown and page fold away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from adaptive_lora.analysis.comparison import (
    AuditKind,
    Comparison,
    EarlyRate,
    FrontArea,
    PowerAnswer,
    VerdictKind,
    types,
)
from adaptive_lora.analysis.comparison import wording as words
from adaptive_lora.analysis.comparison.findings import Change
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import ABSENT, interval_text, mean_text, plain, signed
from adaptive_lora.analysis.stats import Effect, Interval
from adaptive_lora.results import NATS_PER_TOKEN


@cache
def described(name: str) -> Mapping[str, Mapping[str, Any]]:
    """Return one of the descriptions beside this file."""
    found: Mapping[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath(name).read_text("utf-8"))
    return found


VERDICTS = described("tables.yaml")["verdicts"]
"""Verdict -> its symbol, class on the page and style in the terminal; in the order of sorted tables."""
OUTCOMES = described("tables.yaml")["outcomes"]
"""Outcome of an audit's check -> its words and class on the page, in the order in which they are listed."""


_MOST_FAILURES = 200
"""Failed trials with a row of their own."""


class Cell(NamedTuple):
    """One entry: the text shown, and the number that it is sorted by (None: sorted last)."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table as text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


_Text = Callable[[Any], str]
"""Writes a value that is not None."""


def _parameters(found: types.Parameters) -> str:
    return words.count(found.mean) + (f" ({words.percent(found.share)})" if found.share else "")


def _share(share: float) -> str:
    return f"{words.whole_percent(share)} %"


def _early_rate(rate: EarlyRate) -> str:
    if rate.share is None:
        return f"reached by {rate.reached} of {rate.seeds} seeds"
    interval = interval_text(rate.interval, lambda share: f"{100 * share:.0f}")
    return _share(rate.share) + ("" if interval == ABSENT else f" {interval}")


def _effect(found: Effect) -> str:
    interval = interval_text(found.interval, partial(signed, digits=1))
    return ABSENT if found.d_z is None else f"{signed(found.d_z, 1)} {interval}"


def _size(answer: PowerAnswer) -> str:
    return f"{answer.difference:.4f}, {'observed' if answer.about == 'observed' else 'as large as the margin'}"


def _budgets(area: FrontArea) -> str:
    return ABSENT if area.low is None else f"{words.count(area.low)} to {words.count(area.high)}"


_FORMATS: Mapping[str, _Text] = {
    "short": "{:g}".format,
    "plain": plain,
    "signed": signed,
    "count": words.count,
    "number": lambda items: words.count(len(items)),
    "p": words.p_text,
    "share": _share,
    "percent": partial(plain, digits=2, scale=100),
    "seconds": "{:,.1f} s".format,
    "bytes": words.bytes_text,
    **{f"mean {digits}": partial(mean_text, digits=digits) for digits in range(5)},
    "mean %": partial(mean_text, digits=2, scale=100.0),
    "trainings": "{:.2f}".format,
    "share interval": partial(interval_text, number=words.whole_percent),
    "interval": partial(interval_text, number=plain),
    "signed interval": interval_text,
    "parameters": _parameters,
    "difference": lambda found: f"{signed(found.mean)} {interval_text(found.interval)}",
    "gap": lambda found: signed(100 * found.mean, 2),
    "verdict": lambda kind: f"{VERDICTS[kind]['symbol']}\N{NO-BREAK SPACE}{kind}",
    "outcome": lambda kind: OUTCOMES[kind]["text"],
    "seeds": lambda method: f"{len(method.seeds)} of {len(method.seeds) + len(method.missing_seeds)}",
    "early rate": _early_rate,
    "effect": _effect,
    "size": _size,
    "budgets": _budgets,
}
"""Name of a format -> how it writes a value that is not None."""
_SORTED_BY: Mapping[type, Callable[[Any], float | None]] = {
    int: lambda value: value,
    float: lambda value: value,
    tuple: len,
    Interval: lambda interval: interval.low,
    Effect: lambda effect: effect.d_z,
    EarlyRate: lambda rate: rate.share,
    FrontArea: lambda area: area.low,
    VerdictKind: [*VERDICTS].index,
    AuditKind: [*OUTCOMES].index,
    types.SeedMean: lambda found: found.mean,
    types.Parameters: lambda found: found.mean,
    types.Difference: lambda found: found.mean,
    types.ScoreDifference: lambda found: 100 * found.mean,
    Change: lambda found: found.mean,
    PowerAnswer: lambda answer: answer.difference,
    types.MethodSummary: lambda method: len(method.seeds),
}
"""Type of a value -> the number that its column is sorted by; words are sorted as words."""


def value_at(record: Any, path: Iterable[str]) -> Any:
    """Return the value that attributes and keys lead to; None where one on the way is None or missing."""
    for name in path:
        if name != "self" and record is not None:
            record = record.get(name) if isinstance(record, Mapping) else getattr(record, name)
    return record


def _tables(comparison: Comparison, part: str, records: Mapping[str, Iterable[Any]]) -> list[TextTable]:
    """Return the tables of one part of `tables.yaml` that have rows.

    Args:
        comparison: gives the words in braces.
        part: key of the part.
        records: title -> one record a row.
    """
    made = []
    fill = fillings(comparison)
    pruned = any(method.trained_parameters.mean != method.parameters.mean for method in comparison.methods)
    trained: _Text = words.count if pruned else lambda _: ABSENT
    formats: dict[str, _Text] = {**_FORMATS, "fronts": _fronts(comparison), "trained": trained}
    for title, about in described("tables.yaml")[part].items():
        rows_of = list(records[title])
        columns: list[tuple[str, list[Cell]]] = []
        for head, (path, *how) in about["columns"].items():
            for filled, shown in _repeated(comparison, head):
                steps = [step.format(**fill, **filled) for step in path.split(".")]
                name_and_absent = [text.format(**fill, **filled) for text in how]
                cells = [_cell(value_at(record, steps), formats, *name_and_absent) for record in rows_of]
                columns.append((head.format(**fill, **shown), cells))
        columns = [(head, cells) for head, cells in columns if any(cell.text not in ("", ABSENT) for cell in cells)]
        note = about.get("note", "").format(**fill).strip()
        if "intervals" in about:
            steps = about["intervals"].split(".")
            note += words.intervals_note(value_at(record, steps) for record in rows_of)
        rows = tuple(zip(*(cells for _, cells in columns), strict=True))
        made.append(TextTable(title=title, head=tuple(head for head, _ in columns), rows=rows, note=note))
    return [table for table in made if table.rows and len(table.head) > 1]


def _repeated(comparison: Comparison, head: str) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    """Return what fills the braces of a column's path and of its head: once, or for each score or retained source."""
    if "{further}" in head:
        names = dict.fromkeys(name for method in comparison.methods for name in method.further)
        return [({"further": name}, {"further": name.replace("_", " ")}) for name in names]
    if "{forgotten}" in head:
        interval = f"[{words.confidence_text(comparison.confidence)} interval]"
        sources = [source.name for source in comparison.retained]
        several = len(sources) > 1
        heads = [f"Forgotten{f' of {name}' if several else ''} {interval}" for name in sources]
        return [({"retained": name}, {"forgotten": head}) for name, head in zip(sources, heads, strict=True)]
    return [({}, {})]


def _cell(value: Any, formats: Mapping[str, _Text], name: str = "", otherwise: str = ABSENT) -> Cell:
    if value is None:
        return Cell(otherwise)
    sorted_by = _SORTED_BY.get(type(value))
    return Cell(formats[name](value) if name else value, sorted_by(value) if sorted_by else None)


def csv_columns(comparison: Comparison) -> dict[str, str]:
    """Return the columns of `table.csv`: title -> attributes that lead to the value."""
    key = "test_loss" if comparison.outcome.is_loss else "score"
    return {head.replace("test_loss", key): path for head, path in described("tables.yaml")["csv"].items()}


def fillings(comparison: Comparison) -> Mapping[str, str]:
    """Return the words that stand in braces in `tables.yaml` and `figures.yaml`."""
    per_token, outcome = comparison.unit == NATS_PER_TOKEN, comparison.outcome
    forgetting = " Forgotten: loss on the retained data minus that of the frozen base."
    known = {
        "parameters": any(m.parameters.mean is not None for m in comparison.methods),
        "rates": comparison.over == "seed" and any(m.lr is not None for m in comparison.methods),
        "time": any(m.train_seconds.mean is not None for m in comparison.methods),
    }
    raced = " Rates that fell behind on validation loss were stopped on the way, by one rule for all methods."
    return {
        "accuracy": "Token accuracy" if per_token else "Accuracy",
        "baseline": comparison.baseline,
        "confidence": words.confidence_text(comparison.confidence),
        "correction": comparison.correction,
        "each": "averaged over seeds" if comparison.over == "seed" else "of one run per method",
        "forgetting": forgetting if comparison.retained else "",
        "loss": "nats per supervised token" if per_token else comparison.unit,
        "after parameters": " In brackets after parameters: against the baseline." if known["parameters"] else "",
        "at rates": ", each method at its own best learning rate" if known["rates"] else "",
        "training time": "Training time: mean over seeds, without validation." if known["time"] else "",
        "spread": "± standard deviation over seeds" if comparison.over == "seed" else "over test examples",
        "no number": "no number" if _has_examples(comparison) else ABSENT,
        "more seeds": "more than 2,000" if comparison.over == "seed" else ABSENT,
        "outcome": outcome.name,
        "Outcome": outcome.name[:1].upper() + outcome.name[1:],
        "Over": comparison.over.capitalize(),
        "signed": "positive" if outcome.higher_is_better else "negative",
        "in loss": f" in {'nats per supervised token' if per_token else comparison.unit}" if comparison.unit else "",
        "validation": "validation loss" if outcome.is_loss else f"validation {outcome.name}",
        "Validation": "Validation loss" if outcome.is_loss else f"Validation {outcome.name}",
        "margin": plain(comparison.margin.value),
        "one sided": words.confidence_text(one_sided(comparison.confidence)),
        "raced": raced if comparison.raced_rates else "",
        "unit": comparison.unit,
    }


def _has_examples(comparison: Comparison) -> bool:
    """Tell whether the scores of single examples are known."""
    answers = (answer for m in comparison.methods if m.difference is not None for answer in m.difference.power)
    return any(answer.examples for answer in answers)


def _fronts(comparison: Comparison) -> _Text:
    """Return the format that names the costs on whose front a method is."""
    on: dict[str, list[str]] = defaultdict(list)
    for front in comparison.fronts:
        for point in front.points:
            if point.on_front:
                on[point.method].append(str(front.cost))
    return lambda label: ", ".join(on.get(label, ())) or ("none" if comparison.fronts else ABSENT)


def result_table(comparison: Comparison) -> TextTable:
    """Return the answer: rate, parameters, loss, difference with interval, p, verdict and cost of each method."""
    return _tables(comparison, "answer", {"Result": comparison.methods})[0]


def stored_table(comparison: Comparison) -> TextTable:
    """Return the answer as it is recorded for the tracking UI."""
    return _tables(comparison, "stored", {"Result": comparison.methods})[0]


def task_table(comparison: Comparison) -> TextTable | None:
    """Return every task and method, where the result is of a mean over tasks."""
    return next(iter(_tables(comparison, "tasks", {"Each task": comparison.tasks})), None)


def checks(comparison: Comparison) -> list[TextTable]:
    """Return the failed trials, where there are any, and every check of the fairness audit."""
    failures = [failure for method in comparison.methods for failure in method.failures]
    audit = sorted(comparison.audit, key=lambda entry: [*OUTCOMES].index(entry.kind))
    made = _tables(comparison, "checks", {"Failed trials": failures[:_MOST_FAILURES], "Fairness audit": audit})
    if more := len(failures[_MOST_FAILURES:]):
        made[0] = replace(made[0], note=f"{words.plural(more, 'more failed trial')} in comparison.json.")
    return made


def _forgotten(comparison: Comparison) -> list[SimpleNamespace]:
    """Return a record for each retained source and method that was scored on it."""
    return [
        SimpleNamespace(
            method=method.label,
            source=source.name,
            base_loss=source.base_loss,
            allowed=source.allowed,
            found=method.forgetting[source.name],
        )
        for source in comparison.retained
        for method in comparison.methods
        if source.name in method.forgetting
    ]


def more_tables(comparison: Comparison) -> list[TextTable]:
    """Return the tables beside the answer, those with rows."""
    compared = [(m, m.difference) for m in comparison.methods if m.difference is not None]
    tested = [method for method, _ in compared]
    needed = [
        SimpleNamespace(
            method=method.label,
            answer=answer,
            seed_noise=None if difference.components is None else difference.components.seed**0.5,
            example_noise=None if difference.components is None else difference.components.example**0.5,
        )
        for method, difference in compared
        for answer in difference.power
    ]
    rates = [
        SimpleNamespace(
            method=method.label, rate=rate, choice="chosen" if rate.chosen else rate.raced.partition(":")[0]
        )
        for method in comparison.methods
        if len(method.rates) > 1
        for rate in method.rates
    ]
    seeds_so_far = accumulate(len(look.seeds) for look in comparison.looks)
    looks = [
        SimpleNamespace(seeds=seeds, row=row)
        for look, seeds in zip(comparison.looks, seeds_so_far, strict=True)
        for row in look.methods
    ]
    records = {
        "Scores": comparison.methods,
        "Ladder": comparison.ladder.rungs if comparison.ladder else (),
        "Planted ranks": comparison.headroom.methods if comparison.headroom else (),
        "Looks": looks,
        "Forgetting": _forgotten(comparison),
        "Cost and efficiency": comparison.methods,
        "Size of the differences": tested,
        "Other tests": tested,
        "Equivalence": tested if comparison.margin.value is not None else (),
        "Seeds and examples needed": needed,
        "Area under the front": comparison.areas if any(area.gain is not None for area in comparison.areas) else (),
        "Learning rates": rates,
    }
    return _tables(comparison, "more", records)
