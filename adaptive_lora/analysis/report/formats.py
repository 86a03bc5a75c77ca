"""A comparison in every form: a page that needs nothing else, terminal, Markdown, CSV, LaTeX, methods paragraph."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from adaptive_lora.analysis.comparison import Comparison, VerdictKind, wording
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.pairing import used_trials
from adaptive_lora.analysis.comparison.trials import rate_text
from adaptive_lora.analysis.report.figures import Drawing, draw_all
from adaptive_lora.analysis.report.style import colour_of, drawn, drawn_clause, glyph_of
from adaptive_lora.analysis.report.tables import (
    OUTCOMES,
    VERDICTS,
    TextTable,
    checks,
    csv_columns,
    described,
    more_tables,
    result_table,
    task_table,
    value_at,
)
from adaptive_lora.analysis.stats.significance import EXACT_SEEDS
from adaptive_lora.config.types import Precision
from adaptive_lora.results import TrialRecord

SETTINGS = "settings"
"""Name of the fact that holds a study's settings as JSON."""
TEXT_COLUMNS = {"Task", "Method", "Verdict", "Reason", "Run", "Outcome", "Finding", "On the front of", "Retained data"}
"""Columns of words; the others are numbers."""
_MOST_LINES = 20
"""Findings, and failed trials, that the terminal lists."""
_PARTS = {"training": "train", "validation": "validation"}
"""Part of the data in words -> its name in the settings."""


PAGE = "report.html"
"""File name of a report's page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """The study that a report is about."""

    title: str
    examples: Mapping[str, str] = field(default_factory=dict)
    """Example id -> text of the prompt, for the most changed examples."""
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Study id -> how its data were read, as lines for people."""


def write_report(comparison: Comparison, records: Sequence[TrialRecord], folder: Path, about: About) -> Path:
    """Write page, Markdown, JSON, the result table as CSV and LaTeX, methods, and every figure.

    Args:
        comparison: verdicts, tables and audit.
        records: the trials it was made from, for rank maps, curves and examples.
        folder: made where missing; files of an earlier report are replaced.
        about: title, facts and texts.

    Returns:
        Path of `report.html`, written last, so that it is only there when all else is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paragraph = methods_text(comparison, records)
    drawings = draw_all(comparison, records, about.examples, folder / "figures")
    figures = {drawing.name: drawing.title for drawing in drawings}
    values = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    settings = study_file(comparison)
    texts = {
        **({} if settings is None else {"study.yaml": settings}),
        "comparison.json": f"{values}\n",
        "report.md": render_markdown(
            comparison, about.title, figures=figures, methods=paragraph, data=about.data.values()
        ),
        "table.csv": csv_table(comparison),
        "table.tex": latex_table(comparison),
        "methods.txt": f"{paragraph}\n",
        PAGE: render_page(comparison, drawings, about, paragraph),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return folder / PAGE


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the verdict, what is unfair, and the result table."""
    console.print(Panel(Text(comparison.headline, style="bold"), title="Verdict"))
    if comparison.ladder and comparison.ladder.warnings:
        console.print(
            Panel(Text("\n".join(comparison.ladder.warnings), style="red"), title="Ladder", border_style="red")
        )
    if comparison.fairness:
        lines = Text("\n".join(_first(f"! {finding}" for finding in comparison.fairness)), style="red")
        console.print(Panel(lines, title="Less than fair", border_style="red"))
    shown = drawn(comparison)
    kinds = [comparison.method(label).verdict.kind for label in shown]
    console.print(_terminal_table(_only(result_table(comparison), shown), kinds, console.width))
    if comparison.ladder:
        ladder = next(table for table in more_tables(comparison) if table.title == "Ladder")
        console.print(_terminal_table(ladder, [rung.verdict for rung in comparison.ladder.rungs], console.width))
    if clause := drawn_clause(comparison):
        console.print(Text(f"Shown are {clause}. The report has all of them.", style="dim"))
    if (tasks := task_table(comparison)) is not None:
        console.print(_terminal_table(tasks, [row.verdict.kind for row in comparison.tasks], console.width))
    failures = [failure for method in comparison.methods for failure in method.failures]
    for line in _first(
        f"failed: {one.method}, seed {one.seed}, fold {one.fold}, lr {rate_text(one.lr)}: {one.reason}"
        for one in failures
    ):
        console.print(Text(line, style="red"))
    for note in comparison.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"Champion: {comparison.winner} ({comparison.decision})"))


def _first(lines: Iterable[str]) -> Iterator[str]:
    """Yield the first lines, and how many more there are."""
    rest = iter(lines)
    yield from islice(rest, _MOST_LINES)
    if more := sum(1 for _ in rest):
        yield f"... and {more} more, in the report."


def _only(table: TextTable, labels: Collection[str]) -> TextTable:
    """Return the rows of some methods."""
    return replace(table, rows=tuple(row for row in table.rows if row[0].text in labels))


def _terminal_table(table: TextTable, verdicts: Sequence[VerdictKind], width: int) -> Table:
    """Return a table with a verdict a row; a narrow one breaks its cells, and leaves out rate, deviation and cost."""
    narrow, folded = width < 110, width < 170
    left_out = {"Learning rate", "Training time"} if narrow else set()
    shown = [at for at, name in enumerate(table.head) if name not in left_out]
    printed = Table(caption=table.note, caption_justify="left", show_lines=folded)
    for at in shown:
        head = table.head[at]
        if folded:
            head = head.replace(" [", "\n[") if "[" in head else head.replace(" ", "\n")
        justify: Literal["left", "right"] = "left" if head in TEXT_COLUMNS else "right"
        printed.add_column(head, justify=justify, overflow="fold")
    for verdict, row in zip(verdicts, table.rows, strict=True):
        texts = [row[at].text.split(" ± ")[0] if narrow else row[at].text for at in shown]
        if folded:
            texts = [text.replace(" [", "\n[").replace(" (", "\n(") for text in texts]
        cells = [Text(text) for text in (row[0].text, *texts[1:])]
        cells[shown.index(table.head.index("Verdict"))].stylize(VERDICTS[verdict]["terminal"])
        printed.add_row(*cells)
    return printed


@cache
def environment() -> Environment:
    """Return the environment of the report's templates."""
    made = wording.environment("adaptive_lora.analysis.report")
    made.filters.update(md=_escape, grid=markdown_table)
    return made


def render_markdown(
    comparison: Comparison,
    title: str = "Comparison",
    *,
    figures: Mapping[str, str] | None = None,
    methods: str = "",
    data: Iterable[Sequence[str]] = (),
) -> str:
    """Return the whole comparison as Markdown, such as for an MLflow run description.

    Args:
        comparison: verdicts and tables.
        title: heading.
        figures: file name without ending -> title, of the figures that lie beside the text.
        methods: the methods paragraph.
        data: how each study's data were read, as lines.
    """
    template = environment().get_template("report.md.jinja")
    text = template.render(
        comparison=comparison,
        title=title,
        result=result_table(comparison),
        tasks=task_table(comparison),
        checks=checks(comparison),
        more=more_tables(comparison),
        figures=figures,
        methods=methods,
        data=data,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def methods_text(comparison: Comparison, records: Sequence[TrialRecord]) -> str:
    """Return the methods paragraph of a paper, from what the trials behind the numbers recorded."""
    used = [trial for trials in used_trials(comparison, records).values() for trial in trials]
    if not used:
        return ""
    profiled = [trial for trial in used if trial.settings.get("method.metric") not in (None, "None")]
    tests = [trial.test for trial in used if trial.test is not None]
    sizes = {part: [t.settings.get(f"data.{key}_examples") or "" for t in used] for part, key in _PARTS.items()}
    known = {part: wording.span(map(float, found)) for part, found in sizes.items() if all(found)}
    known["test"] = wording.span(len(test.example_ids) for test in tests)
    precision = _one(trial.tags.get("precision") for trial in used)
    template = environment().get_template("methods.txt.jinja")
    text = template.render(
        words=wording,
        rates=lambda rates: wording.joined([f"{lr:g}" for lr in rates]),
        comparison=comparison,
        compared=[m for m in comparison.methods if m.difference is not None],
        cfg=_alike(used),
        profiled=_alike(profiled),
        metrics=sorted({trial.settings["method.metric"] for trial in profiled}),
        parts=[f"{size} {part}" for part, size in known.items()],
        folds=len({trial.fold for trial in used}),
        test_tokens=[int(test.tokens_E.sum()) for test in tests],
        precision=Precision(precision).description if precision in tuple(Precision) else "",
        packages=_one(record.tags.get("packages") for record in records if record.status == "FINISHED"),
        grids=list({tuple(rate.lr for rate in m.rates) for m in comparison.methods if m.seeds}),
        exact_seeds=EXACT_SEEDS,
        one_sided=one_sided(comparison.confidence),
        looked_at=[str(seeds) for seeds in accumulate(len(look.seeds) for look in comparison.looks)],
    )
    return " ".join(text.split())


def _alike(trials: Sequence[TrialRecord]) -> Mapping[str, str | None]:
    """Return the settings that all trials recorded alike, without `cfg.`; None for every other one."""
    first, *others = [trial.settings for trial in trials] or [{}]
    alike = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    named = {key.removeprefix("cfg."): value for key, value in alike.items() if value != "None"}
    return defaultdict(lambda: None, named)


def _one(values: Iterable[str | None]) -> str | None:
    """Return the value that all have; None where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def markdown_table(table: TextTable) -> str:
    """Return a table and its note."""
    lines = [f"| {' | '.join(map(_escape, table.head))} |"]
    lines.append("|" + "".join("---|" if name in TEXT_COLUMNS else "---:|" for name in table.head))
    lines += [f"| {' | '.join(_escape(cell.text) for cell in row)} |" for row in table.rows]
    if table.note:
        lines += ["", _escape(table.note)]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is: no table breaks, links or HTML from data."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|[]`*":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def table_values(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one dictionary per method, with the columns of `table.csv`; of several things, their number."""
    columns = csv_columns(comparison)
    rows = []
    for method in comparison.methods:
        values = (
            value_at(method, path.format(correction=comparison.correction).split(".")) for path in columns.values()
        )
        shown = (len(value) if isinstance(value, tuple) else value for value in values)
        rows.append(dict(zip(columns, shown, strict=True)))
    return rows


def csv_table(comparison: Comparison) -> str:
    """Return one line per method with every digit; a value that does not exist is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, csv_columns(comparison), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_values(comparison))
    return text.getvalue()


def latex_table(comparison: Comparison) -> str:
    """Return the result table as a `tabular` of the booktabs package, with its note."""
    table = result_table(comparison)
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{''.join('l' if name in TEXT_COLUMNS else 'r' for name in table.head)}}}",
        r"\toprule",
        f"{' & '.join(map(latex, table.head))} \\\\",
        r"\midrule",
        *(f"{' & '.join(latex(cell.text) for cell in row)} \\\\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        f"% {' '.join(table.note.split())}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Return a text that LaTeX sets as it is."""
    known = {**described("tables.yaml")["latex"], **{character: f"\\{character}" for character in "&%$#_{}"}}
    return "".join(known.get(character, character) for character in text.replace("\n", " "))


def study_file(comparison: Comparison) -> str | None:
    """Return the settings as YAML for `adaptive-lora study --config`; None where not recorded."""
    text = comparison.facts.get(SETTINGS)
    if text is None:
        return None
    return yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True, default_flow_style=None)


def render_page(comparison: Comparison, drawings: Sequence[Drawing], about: About, methods: str) -> str:
    """Return the page, which needs nothing beside it: no network, no file, no storage.

    Its policy lets no script run but its own, by digest, whatever text comes from data.
    """
    result = result_table(comparison)
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    labels = [method.label for method in comparison.methods]
    return environment().get_template("template.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        comparison=comparison,
        result=result,
        tasks=task_table(comparison),
        # Figures are built as an XML tree, which escapes; all else goes through autoescape.
        drawings=[(drawing, Markup(drawing.svg)) for drawing in drawings],
        checks=checks(comparison),
        more=more_tables(comparison),
        about=about,
        methods=methods,
        study_file=study_file(comparison),
        settings=SETTINGS,
        formats={
            "LaTeX": latex_table(comparison),
            "CSV": csv_table(comparison),
            "Markdown": markdown_table(result),
        },
        # JSON that cannot end its element: it holds no `<`, `>` or `&`.
        values=htmlsafe_json_dumps(comparison.to_dict(), allow_nan=False),
        places={label: place for place, label in enumerate(labels)},
        glyphs={label: (colour_of(comparison, label), glyph_of(comparison, label)) for label in labels},
        verdicts=VERDICTS,
        drawn=set(drawn(comparison)),
        outcomes={outcome["text"]: outcome["page"] for outcome in OUTCOMES.values()},
        text_columns=TEXT_COLUMNS,
        signed=wording.signed,
    )  # fmt: skip
