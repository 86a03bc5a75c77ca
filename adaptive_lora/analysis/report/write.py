"""The report's folder: one HTML page that needs nothing else, with files for papers beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.about import About
from adaptive_lora.analysis.report.figures import Material, draw_all
from adaptive_lora.analysis.report.files import csv_table, latex_table
from adaptive_lora.analysis.report.markdown import render_report
from adaptive_lora.analysis.report.methods import methods_text
from adaptive_lora.analysis.report.page import render_page
from adaptive_lora.analysis.report.reproduce import study_file
from adaptive_lora.results import TrialRecord


def write_report(comparison: Comparison, records: Sequence[TrialRecord], folder: Path, about: About) -> Path:
    """Write page, Markdown, JSON, the result table as CSV and LaTeX, methods, and every figure.

    Args:
        comparison: what to report.
        records: the trials it was made from, for rank maps, curves and examples.
        folder: made where missing; files of an earlier report are replaced.
        about: title, facts and texts.

    Returns:
        Path of `report.html`, written last, so that it is only there when all else is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    material = Material(comparison=comparison, records=records, examples=about.examples)
    paragraph = methods_text(comparison, records)
    drawings = draw_all(material, folder / "figures")
    titles = {drawing.name: drawing.title for drawing in drawings}
    values = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    texts = {
        "comparison.json": f"{values}\n",
        "report.md": render_report(comparison, about, titles, paragraph),
        "table.csv": csv_table(comparison),
        "table.tex": latex_table(comparison),
        "methods.txt": f"{paragraph}\n",
        "report.html": render_page(comparison, drawings, about, paragraph),
    }
    repeats = study_file(comparison)
    if repeats is not None:
        texts = {"study.yaml": repeats, **texts}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return folder / "report.html"
