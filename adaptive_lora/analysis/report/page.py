"""The report's folder: one HTML page that needs nothing else, and files for papers beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adaptive_lora.analysis.comparison import AuditKind, Comparison, MethodSummary, VerdictKind
from adaptive_lora.analysis.comparison.wording import signed
from adaptive_lora.analysis.report.figures import Drawing, draw_all
from adaptive_lora.analysis.report.formats import (
    SETTINGS,
    TEXT_COLUMNS,
    About,
    csv_table,
    latex_table,
    markdown_table,
    render_report,
    study_file,
)
from adaptive_lora.analysis.report.methods import methods_text
from adaptive_lora.analysis.report.style import colour_of, glyph_of
from adaptive_lora.analysis.report.tables import OUTCOMES, SYMBOLS, checks, more_tables, result_table
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

_AUDIT_TONES: Mapping[AuditKind, str] = {AuditKind.OK: "good", AuditKind.BAD: "bad", AuditKind.UNKNOWN: "open"}
_LONG_COLUMNS = {"Reason", "Finding"}
"""Columns of sentences."""
_MOST_FINDINGS = 5
"""Findings shown above the verdict; the others unfold."""
_SECTIONS = (
    ("results", "Result"),
    ("verdicts", "Each method"),
    ("figures", "Figures"),
    ("fairness-audit", "Fairness audit"),
    ("more-statistics", "More statistics"),
    ("methods", "Methods"),
    ("reproduce", "How to reproduce"),
)


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
    titles = {drawing.name: drawing.title for drawing in drawings}
    values = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    settings = study_file(comparison)
    texts = {
        **({} if settings is None else {"study.yaml": settings}),
        "comparison.json": f"{values}\n",
        "report.md": render_report(comparison, about, titles, paragraph),
        "table.csv": csv_table(comparison),
        "table.tex": latex_table(comparison),
        "methods.txt": f"{paragraph}\n",
        "report.html": render_page(comparison, drawings, about, paragraph),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return folder / "report.html"


def render_page(comparison: Comparison, drawings: Sequence[Drawing], about: About, methods: str) -> str:
    """Return the page, which needs nothing beside it: no network, no file, no storage.

    Its policy lets no script run but its own, by digest, whatever text comes from data.
    """
    result = result_table(comparison)
    return (
        _environment()
        .get_template("template.html")
        .render(
            title=about.title,
            comparison=comparison,
            result=result,
            # Figures are built as an XML tree, which escapes; all else goes through autoescape.
            drawings=[(drawing, Markup(drawing.svg)) for drawing in drawings],
            checks=checks(comparison),
            more=more_tables(comparison),
            data=about.data,
            changes=_changes(comparison, about.examples),
            methods=methods,
            unfair_topics=_topics(comparison, AuditKind.BAD),
            audit_summary=_audit_summary(comparison),
            facts={name: value for name, value in comparison.facts.items() if name != SETTINGS},
            study_file=study_file(comparison),
            first_study=comparison.facts.get("study id", "the study").split(", ")[0],
            formats=[
                ("LaTeX", latex_table(comparison)),
                ("CSV", csv_table(comparison)),
                ("Markdown", markdown_table(result)),
            ],
            values=_json_in_html(comparison),
            **_looks(comparison),
        )
    )


def _environment() -> Environment:
    """Return the template's environment: everything escaped, nothing undefined."""
    environment = Environment(
        loader=PackageLoader("adaptive_lora.analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(soft=_soft, slug=_slug, brief=_brief)
    style, script = (
        files("adaptive_lora.analysis.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    environment.globals.update(
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(_source_hash(script)),
        sections=_SECTIONS,
        symbols=SYMBOLS,
        tones=TONES,
        outcomes={OUTCOMES[kind]: tone for kind, tone in _AUDIT_TONES.items()},
        text_columns=TEXT_COLUMNS,
        long_columns=_LONG_COLUMNS,
        most_findings=_MOST_FINDINGS,
    )
    return environment


def _looks(comparison: Comparison) -> dict[str, Mapping[str, Any]]:
    """Return each method's place, by which the script finds it, and its colour and symbol."""
    labels = [method.label for method in comparison.methods]
    return {
        "places": {label: place for place, label in enumerate(labels)},
        "glyphs": {label: (colour_of(comparison, label), glyph_of(comparison, label)) for label in labels},
    }


def _topics(comparison: Comparison, kind: AuditKind) -> list[str]:
    return list(dict.fromkeys(entry.topic for entry in comparison.audit if entry.kind is kind))


def _audit_summary(comparison: Comparison) -> str:
    """Return how many topics are fair, less than fair and unknown."""
    bad = _topics(comparison, AuditKind.BAD)
    unknown = _topics(comparison, AuditKind.UNKNOWN)
    topics = {entry.topic for entry in comparison.audit}
    fair = len(topics - {*bad, *unknown})
    text = f"{fair} of {len(topics)} checks fair"
    if unknown:
        text += f", {len(unknown)} not recorded ({', '.join(unknown)})"
    return text


def _source_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json_in_html(comparison: Comparison) -> Markup:
    """Return JSON that cannot end its element: it holds no `<`, `>` or `&`."""
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _soft(label: str) -> Markup:
    """Return an escaped label that may break after its own separators."""
    text = str(escape(label))
    for character, soft in (("_", "_<wbr>"), ("-", "-<wbr>"), ("@", "<wbr>@")):
        text = text.replace(character, soft)
    return Markup(text)


def _brief(finding: str, most: int = 400) -> str:
    """Return a finding that leaves room for the verdict; the audit below has all of it."""
    if len(finding) <= most:
        return finding
    return f"{finding[:most].rsplit(' ', 1)[0]} \N{HORIZONTAL ELLIPSIS} (all of it: fairness audit)"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _changes(comparison: Comparison, examples: Mapping[str, str]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return per method the most changed examples as id, difference in nats, text."""

    def rows(method: MethodSummary) -> list[tuple[str, str, str]]:
        return [
            (change.example_id, signed(change.difference, 2), examples.get(change.example_id, ""))
            for change in method.most_changed
        ]

    return [(method.label, rows(method)) for method in comparison.methods if method.most_changed]
