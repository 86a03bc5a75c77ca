"""The report's folder: one HTML page that needs nothing else, and files for papers beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.comparison.wording import signed
from adaptive_lora.analysis.report.figures import Drawing, draw_all
from adaptive_lora.analysis.report.formats import (
    SETTINGS,
    TEXT_COLUMNS,
    About,
    csv_table,
    environment,
    latex_table,
    markdown_table,
    methods_text,
    render_markdown,
    study_file,
)
from adaptive_lora.analysis.report.style import colour_of, glyph_of
from adaptive_lora.analysis.report.tables import OUTCOMES, SYMBOLS, checks, more_tables, result_table
from adaptive_lora.results import TrialRecord


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
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    labels = [method.label for method in comparison.methods]
    return environment().get_template("template.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        comparison=comparison,
        result=result,
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
        symbols=SYMBOLS,
        outcomes={outcome: kind for kind, outcome in OUTCOMES.items()},
        text_columns=TEXT_COLUMNS,
        signed=signed,
    )  # fmt: skip
