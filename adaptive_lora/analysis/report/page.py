"""The report's page: the template filled with a comparison, its figures and its tables."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adaptive_lora.analysis.comparison import AuditKind, Comparison, MethodSummary, VerdictKind
from adaptive_lora.analysis.comparison.wording import signed
from adaptive_lora.analysis.report.about import About
from adaptive_lora.analysis.report.cost_tables import OUTCOMES
from adaptive_lora.analysis.report.figures import Drawing
from adaptive_lora.analysis.report.files import csv_table, latex_table
from adaptive_lora.analysis.report.markdown import markdown_table
from adaptive_lora.analysis.report.reproduce import other_facts, study_file
from adaptive_lora.analysis.report.style import colour_of, glyph_of
from adaptive_lora.analysis.report.tables import SYMBOLS, further_tables, result_table

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
_TEXT_COLUMNS: Mapping[str, str] = {
    "Verdict": "text",
    "Reason": "text long",
    "Run": "text",
    "Outcome": "text",
    "Finding": "text long",
    "On the front of": "text",
}
"""Columns of words, and their CSS classes."""
_MOST_FINDINGS = 5
"""Findings shown above the verdict; the others unfold."""
_SECTIONS = (
    ("results", "Result"),
    ("verdicts", "Each method"),
    ("figures", "Figures"),
    ("scores", "Scores"),
    ("cost-and-efficiency", "Cost"),
    ("fairness-audit", "Fairness audit"),
    ("methods", "Methods"),
    ("reproduce", "How to reproduce"),
)


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
            tables=further_tables(comparison),
            data=about.data,
            changes=_changes(comparison, about.examples),
            methods=methods,
            unfair_topics=_topics(comparison, AuditKind.BAD),
            audit_summary=_audit_summary(comparison),
            facts=other_facts(comparison),
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
    """Return the template's surroundings: everything escaped, nothing undefined."""
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
        text_columns=_TEXT_COLUMNS,
        most_findings=_MOST_FINDINGS,
    )
    return environment


def _looks(comparison: Comparison) -> dict[str, Mapping[str, Any]]:
    """Return per method its place, by which the script finds it, and its colour and sign."""
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
    """Return JSON that cannot end its element: no `<`, `>` or `&` stands in it."""
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _soft(label: str) -> Markup:
    """Return an escaped label that may break after its own separators."""
    text = str(escape(label))
    for sign, soft in (("_", "_<wbr>"), ("-", "-<wbr>"), ("@", "<wbr>@")):
        text = text.replace(sign, soft)
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
