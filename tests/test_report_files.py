"""The result table as programs and papers get it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_study import EFFECTS, FROZEN_LOSS, failed, scores, study

from adaptive_lora.analysis.comparison import Comparison, compare
from adaptive_lora.analysis.report import About, write_report
from adaptive_lora.analysis.report.formats import csv_table, latex, latex_table, markdown_table
from adaptive_lora.analysis.report.tables import described, result_table
from adaptive_lora.config import load_study, study_from

LABELS = ('a,"b"', "50%_of$all&more#{x}", "back\\slash~hat^")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    records = study({**EFFECTS, **dict.fromkeys(LABELS, 0.01)}, range(3))
    records.append(failed("never", 0, "out of memory"))
    return compare(records, baseline="uniform-r8", base_scores=scores(FROZEN_LOSS, 0))


def test_csv_has_every_digit(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert list(rows[0]) == list(described("tables.yaml")["csv"])
    assert [row["method"] for row in rows] == [m.label for m in comparison.methods]
    for row, method in zip(rows, comparison.methods, strict=True):
        assert row["verdict"] == method.verdict.kind
        assert row["failed_trials"] == str(len(method.failures))
        if method.loss.mean is None:
            assert row["test_loss"] == row["parameters"] == row["learning_rate"] == ""
            continue
        assert float(row["test_loss"]) == method.loss.mean
        assert float(row["test_loss_sd"]) == method.loss.sd
        assert float(row["parameters"]) == method.parameters.mean
        difference = method.difference
        if difference is None:
            assert row["difference"] == row["interval_low"] == row["p_corrected"] == ""
        else:
            assert float(row["difference"]) == difference.mean
            assert float(row["interval_low"]) == difference.interval.low
            assert float(row["interval_high"]) == difference.interval.high
            assert float(row["p"]) == difference.tests.sign_flip
            assert float(row["p_corrected"]) == difference.tests.holm


def test_latex_has_as_many_cells_in_every_row(comparison: Comparison) -> None:
    lines = latex_table(comparison).splitlines()
    rows = [line.removesuffix(r"\\") for line in lines if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", "\n".join(lines))
    assert columns is not None
    assert len(rows) == 1 + len(comparison.methods)
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) + 1 == len(columns.group(1))
        assert not re.search(r"(?<!\\)[%#_]", row)
        assert row.isascii()
        assert len(re.findall(r"(?<!\\)\{", row)) == len(re.findall(r"(?<!\\)\}", row))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        ("\N{MINUS SIGN}0.1 ± 0.2", r"$-$0.1 $\pm$ 0.2"),
        ("x\\y{z}", r"x\textbackslash{}y\{z\}"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_escapes(text: str, expected: str) -> None:
    assert latex(text) == expected


def test_latex_compiles(comparison: Comparison, tmp_path: Path) -> None:
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip("pdflatex is not installed")
    text = (
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{latex_table(comparison)}\\end{{document}}\n"
    )
    (tmp_path / "table.tex").write_text(text, encoding="utf-8")
    command = [compiler, "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-2000:]


def test_study_file_gives_the_settings_back(tmp_path: Path) -> None:
    config = study_from({"methods": "uniform:rank=8 three_band", "lr": "1e-4,3e-4", "folds": 2})
    records = study(EFFECTS, range(2))
    facts = {"study id": "s-1", "settings": json.dumps(config.flat())}
    comparison = compare(records, baseline="uniform-r8", facts=facts)
    write_report(comparison, records, tmp_path, About(title="t"))
    assert load_study(tmp_path / "study.yaml", {}) == config
    assert "repeats s-1." in " ".join((tmp_path / "report.html").read_text().split())


def test_markdown_table_shows_the_text_of_every_cell(comparison: Comparison) -> None:
    table = result_table(comparison)
    lines = markdown_table(table).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(table.rows)
    for line, row in zip(lines[2:], table.rows, strict=False):
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        shown = [re.sub(r"\\(.)", r"\1", cell).strip() for cell in cells]
        assert shown[1:] == [" ".join(cell.text.split()) for cell in row[1:]]
