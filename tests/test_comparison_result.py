"""The result of a comparison in a script and in a notebook."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from synthetic_study import EFFECTS, FROZEN_LOSS, scores, study

from adaptive_lora.analysis.comparison import compare
from adaptive_lora.analysis.report import About, ComparisonResult

EVIL = "<b>x</b>"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    records = study({**EFFECTS, EVIL: -0.01}, range(6))
    comparison = compare(records, baseline="uniform-r8", base_scores=scores(FROZEN_LOSS, 0))
    folder = tmp_path_factory.mktemp("result") / "report"
    return ComparisonResult(comparison=comparison, records=tuple(records), about=About(title="Study"), folder=folder)


def test_verdict_and_rows_are_those_of_the_comparison(result: ComparisonResult) -> None:
    assert result.verdict == result.comparison.headline
    assert repr(result) == f"<ComparisonResult: {result.verdict}>"
    rows = result.table
    assert [row["method"] for row in rows] == [method.label for method in result.comparison.methods]
    assert len(rows) == len(result.comparison.methods)
    compared = result.comparison.methods[1]
    assert compared.difference is not None
    assert rows[1]["difference"] == compared.difference.mean
    assert rows[0]["difference"] is None
    assert [row["seeds"] for row in rows[:2]] == [6, 6]


def test_printed_text_shows_every_method_and_its_verdict(result: ComparisonResult) -> None:
    table = str(result.table)
    for method in result.comparison.methods:
        assert method.label in table
        assert str(method.verdict.kind) in table
    # Lines are broken at the width of a terminal.
    assert result.verdict.split(":")[0] in " ".join(str(result).replace("│", " ").split())


def test_names_from_data_are_no_markup_in_a_notebook(result: ComparisonResult) -> None:
    page = result._repr_html_()
    assert EVIL not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert page.count("<tr>") == 1 + len(result.comparison.methods)


def test_report_is_written_where_asked_and_has_the_same_values(result: ComparisonResult, tmp_path: Path) -> None:
    page = result.report(tmp_path / "own")
    assert page == tmp_path / "own" / "report.html"
    assert json.loads((page.parent / "comparison.json").read_text("utf-8")) == result.to_dict()
    with (page.parent / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in result.table]
    assert float(rows[1]["difference"]) == result.table[1]["difference"]
    assert not result.folder.exists()
