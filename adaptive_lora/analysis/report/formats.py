"""A comparison in every form but the page: terminal, Markdown, CSV, LaTeX and the study's settings."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from adaptive_lora.analysis.comparison import Comparison, Difference, MethodSummary, VerdictKind
from adaptive_lora.analysis.report.tables import TextTable, checks, more_tables, p_decides, result_table

SETTINGS = "settings"
"""Name of the fact that holds a study's settings as JSON."""
TEXT_COLUMNS = {"Method", "Verdict", "Reason", "Run", "Outcome", "Finding", "On the front of"}
"""Columns of words; the others are numbers."""
_STYLES: Mapping[VerdictKind, str] = {
    VerdictKind.BETTER: "bold green",
    VerdictKind.WORSE: "bold red",
    VerdictKind.EQUIVALENT: "cyan",
    VerdictKind.NON_INFERIOR: "cyan",
    VerdictKind.NOT_COMPARED: "red",
}
_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{NO-BREAK SPACE}": "~",
    "\N{BLACK DIAMOND}": r"$\diamond$",
    "\N{BLACK UP-POINTING TRIANGLE}": r"$\uparrow$",
    "\N{BLACK DOWN-POINTING TRIANGLE}": r"$\downarrow$",
    "\N{ALMOST EQUAL TO}": r"$\approx$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{WHITE CIRCLE}": r"$\circ$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """The study that a report is about."""

    title: str
    examples: Mapping[str, str] = field(default_factory=dict)
    """Example id -> text of the prompt, for the most changed examples."""
    data: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Study id -> how its data were read, as lines for people."""


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the verdict, what is unfair, and the result table."""
    console.print(Panel(Text(comparison.headline, style="bold"), title="Verdict"))
    if comparison.fairness:
        lines = Text("\n".join(f"! {finding}" for finding in comparison.fairness), style="red")
        console.print(Panel(lines, title="Less than fair", border_style="red"))
    console.print(_terminal_table(comparison, console.width))
    for failure in (failure for method in comparison.methods for failure in method.failures):
        where = f"{failure.method}, seed {failure.seed}, fold {failure.fold}, lr {failure.lr:g}"
        console.print(Text(f"failed: {where}: {failure.reason}", style="red"))
    for note in comparison.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"Champion: {comparison.winner} ({comparison.decision})"))


def _terminal_table(comparison: Comparison, width: int) -> Table:
    """Return the result table; a narrow one breaks its cells, and leaves out rate, deviation and cost."""
    table = result_table(comparison)
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
    for method, row in zip(comparison.methods, table.rows, strict=True):
        texts = [row[at].text.split(" ± ")[0] if narrow else row[at].text for at in shown]
        if folded:
            texts = [text.replace(" [", "\n[").replace(" (", "\n(") for text in texts]
        cells = [Text(text) for text in (method.label, *texts[1:])]
        cells[shown.index(table.head.index("Verdict"))].stylize(_STYLES.get(method.verdict.kind, ""))
        printed.add_row(*cells)
    return printed


def render_markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """Return the whole comparison as Markdown, such as for an MLflow run description."""
    parts = [f"# {_escape(title)}", f"**{_escape(comparison.answer)}**", _escape(" ".join(comparison.remarks))]
    if comparison.fairness:
        parts.append("## Less than fair")
        parts.append("\n".join(f"- {_escape(finding)}" for finding in comparison.fairness))
    parts += _titled(result_table(comparison))
    parts.append("\n".join(f"- {_escape(note)}" for note in comparison.notes))
    parts.append(f"Champion: **{_escape(comparison.winner)}**: {_escape(comparison.decision)}.")
    parts.append("## Verdicts")
    parts.append("\n".join(f"- **{_escape(m.label)}**: {_escape(m.verdict.text)}" for m in comparison.methods))
    for table in checks(comparison):
        parts += _titled(table)
    parts += ["## More statistics", "<details><summary>Tables beside the answer</summary>"]
    for table in more_tables(comparison):
        parts += _titled(table, level="###")
    parts.append("</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def render_report(comparison: Comparison, about: About, figures: Mapping[str, str], methods: str) -> str:
    """Return the comparison with the figures beside it, the methods paragraph and the data.

    Args:
        comparison: verdicts and tables.
        about: title, and how the data were read.
        figures: file name without ending -> title.
        methods: the paragraph.
    """
    images = [f"![{_escape(words)}](figures/{name}.png)" for name, words in figures.items()]
    parts = [render_markdown(comparison, about.title).rstrip(), "## Figures", *images]
    parts += ["## Methods", _escape(methods)]
    if about.data:  # indented, it is shown as it is
        lines = ["\n".join(f"    {line}" for line in block) for block in about.data.values()]
        parts += ["## Data", "\n\n<!-- -->\n\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _titled(table: TextTable, level: str = "##") -> list[str]:
    return [f"{level} {table.title}", markdown_table(table)]


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


_Reader = Callable[[Comparison, MethodSummary], str | float | int | None]


def _of_difference(read: Callable[[Difference], float | str | None]) -> _Reader:
    return lambda _, m: None if m.difference is None else read(m.difference)


COLUMNS: Mapping[str, _Reader] = {
    "method": lambda c, m: m.label,
    "verdict": lambda c, m: str(m.verdict.kind),
    "difference": _of_difference(lambda d: d.mean),
    "interval_low": _of_difference(lambda d: d.interval.low),
    "interval_high": _of_difference(lambda d: d.interval.high),
    "interval_method": _of_difference(lambda d: d.interval.method),
    "p": _of_difference(lambda d: d.tests.sign_flip),
    "p_corrected": lambda c, m: p_decides(c, m),
    "test_loss": lambda c, m: m.loss.mean,
    "test_loss_sd": lambda c, m: m.loss.sd,
    "test_loss_low": lambda c, m: m.loss_interval.low,
    "test_loss_high": lambda c, m: m.loss_interval.high,
    "perplexity": lambda c, m: m.perplexity.mean,
    "token_accuracy": lambda c, m: m.token_accuracy.mean,
    "exact_match": lambda c, m: m.exact_match.mean,
    "parameters": lambda c, m: m.parameters.mean,
    "parameters_to_baseline": lambda c, m: m.parameters.share,
    "learning_rate": lambda c, m: m.lr,
    "seeds": lambda c, m: len(m.seeds),
    "missing_seeds": lambda c, m: len(m.missing_seeds),
    "failed_trials": lambda c, m: len(m.failures),
}
"""Column -> its value; losses in the comparison's unit, shares as fractions of 1."""


def csv_table(comparison: Comparison) -> str:
    """Return one line per method with every digit; a value that does not exist is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for method in comparison.methods:
        values = [read(comparison, method) for read in COLUMNS.values()]
        writer.writerow(["" if value is None else value for value in values])
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
    return "".join(_LATEX.get(character, character) for character in text.replace("\n", " "))


def study_file(comparison: Comparison) -> str | None:
    """Return the settings as YAML for `adaptive-lora study --config`; None where not recorded."""
    text = comparison.facts.get(SETTINGS)
    if text is None:
        return None
    return yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True, default_flow_style=None)
