"""The report: one HTML page that needs nothing else, with Markdown, JSON and PNG beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adaptive_lora.comparison import Comparison, MethodSummary, VerdictKind
from adaptive_lora.comparison.wording import signed
from adaptive_lora.report.figures import Drawing, draw_all
from adaptive_lora.report.tables import (
    SYMBOLS,
    evidence_table,
    failure_table,
    rate_table,
    render_markdown,
    result_table,
    score_table,
)
from adaptive_lora.results import TrialRecord

TONES: Mapping[VerdictKind, str] = {
    VerdictKind.BASELINE: "plain",
    VerdictKind.BETTER: "good",
    VerdictKind.WORSE: "bad",
    VerdictKind.EQUIVALENT: "even",
    VerdictKind.NON_INFERIOR: "even",
    VerdictKind.INCONCLUSIVE: "open",
    VerdictKind.NOT_COMPARED: "bad",
}
"""CSS class per verdict; the word and its symbol say the same without colour."""


def write_report(
    comparison: Comparison,
    records: Sequence[TrialRecord],
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    examples: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`, `report.md`, `comparison.json` and `figures/*.png`.

    Args:
        comparison: what to report.
        records: the trials it was made from, for rank maps and curves.
        folder: made where missing; files of an earlier report are replaced.
        title: of the page.
        facts: name -> value under "How to reproduce": command, versions, digests. A value of
            several lines is shown as code.
        examples: example id -> text of the prompt, for the table of most changed examples.

    Returns:
        Path of `report.html`, written last, so that it is only there when all else is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = draw_all(comparison, records, folder / "figures")
    html = _page(comparison, drawings, title, facts, examples or {})
    values = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "comparison.json").write_text(values + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(comparison, title), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _page(
    comparison: Comparison,
    drawings: Sequence[Drawing],
    title: str,
    facts: Mapping[str, str],
    examples: Mapping[str, str],
) -> str:
    environment = Environment(
        loader=PackageLoader("adaptive_lora.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft"] = _soft
    more = (score_table, evidence_table, rate_table, failure_table)
    return environment.get_template("template.html").render(
        title=title,
        comparison=comparison,
        symbols=SYMBOLS,
        tones=TONES,
        result=result_table(comparison),
        # Matplotlib escapes the labels in its SVG; everything else goes through autoescape.
        drawings=[(drawing, Markup(drawing.svg)) for drawing in drawings],
        tables=[table for make in more if (table := make(comparison)).rows],
        changes=_changes(comparison, examples),
        facts=facts,
    )


def _soft(label: str) -> Markup:
    """Return an escaped label that may break after its own separators."""
    return Markup(str(escape(label)).replace("_", "_<wbr>").replace("-", "-<wbr>"))


def _changes(
    comparison: Comparison, examples: Mapping[str, str]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return per method the most changed examples as id, difference in nats, text."""

    def rows(method: MethodSummary) -> list[tuple[str, str, str]]:
        return [
            (change.example_id, signed(change.difference, 2), examples.get(change.example_id, ""))
            for change in method.most_changed
        ]

    return [(method.label, rows(method)) for method in comparison.methods if method.most_changed]
