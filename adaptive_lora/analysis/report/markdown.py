"""The comparison as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.about import About
from adaptive_lora.analysis.report.cells import TextTable
from adaptive_lora.analysis.report.tables import further_tables, result_table


def render_markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """Return the whole comparison as Markdown, such as for an MLflow run description."""
    parts = [f"# {_escape(title)}", f"**{_escape(comparison.answer)}**"]
    parts.append(_escape(" ".join(comparison.remarks)))
    if comparison.fairness:
        parts.append("## Less than fair")
        parts.append("\n".join(f"- {_escape(finding)}" for finding in comparison.fairness))
    result = result_table(comparison)
    parts += [f"## {result.title}", markdown_table(result)]
    parts.append("\n".join(f"- {_escape(note)}" for note in comparison.notes))
    parts.append(f"Champion: **{_escape(comparison.winner)}**: {_escape(comparison.decision)}.")
    parts.append("## Verdicts")
    parts.append("\n".join(f"- **{_escape(m.label)}**: {_escape(m.verdict.text)}" for m in comparison.methods))
    for table in further_tables(comparison):
        parts += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_report(comparison: Comparison, about: About, figures: Mapping[str, str], methods: str) -> str:
    """Return the comparison with the figures beside it, the methods paragraph and the data.

    Args:
        comparison: what is reported.
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


def markdown_table(table: TextTable) -> str:
    """Return a table and its note."""
    lines = [f"| {' | '.join(map(_escape, table.head))} |"]
    lines.append("|" + "---|" * len(table.head))
    lines += [f"| {' | '.join(_escape(cell.text) for cell in row)} |" for row in table.rows]
    if table.note:
        lines += ["", _escape(table.note)]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is: no table breaks, links or HTML from data."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "|[]`*":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
