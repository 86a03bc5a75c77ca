"""The report as a reader and a browser get it."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_study import EFFECTS, FROZEN_LOSS, failed, scores, study

from adaptive_lora.comparison import Comparison, compare
from adaptive_lora.report import render_markdown, render_terminal, write_report
from adaptive_lora.results import TrialRecord

EVIL = "<script>alert('x')</script>"
RATES = (1e-4, 3e-4, 1e-3)
FACTS = {"command": "adaptive-lora study\n  --seeds 0,1", f"key {EVIL}": f"value {EVIL}"}
FIGURES = {
    "differences",
    "loss_against_parameters",
    "rank_maps",
    "validation_curves",
    "learning_rates",
}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


def evil_study() -> list[TrialRecord]:
    effects = {**EFFECTS, f"{EVIL}|$x$": -0.01}
    records = study(effects, range(3), rates=RATES)
    return [*records, failed("uniform-r16", 9, f"reason {EVIL}", lr=3e-4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    records = evil_study()
    comparison = compare(records, baseline="uniform-r8", frozen=scores(FROZEN_LOSS, 0))
    changed = comparison.methods[1].most_changed[0].example_id
    path = write_report(
        comparison,
        records,
        tmp_path_factory.mktemp("report"),
        title=f"Study {EVIL}",
        facts=FACTS,
        examples={changed: f"Say {EVIL} politely."},
    )
    return comparison, path


def test_answer_comes_first_then_what_is_unfair_then_the_table(
    made: tuple[Comparison, Path],
) -> None:
    comparison, path = made
    text = Page(path.read_text(encoding="utf-8")).text
    places = [
        text.index(part)
        for part in (comparison.answer, comparison.fairness[0], "Result", "How to reproduce")
    ]
    assert places == sorted(places)
    for finding in comparison.fairness:
        assert finding in text
    for method in comparison.methods:
        assert method.verdict.text in text


def test_text_from_data_cannot_become_markup(made: tuple[Comparison, Path]) -> None:
    _, path = made
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link", "img")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for shown in (f"Study {EVIL}", f"key {EVIL}", f"value {EVIL}", f"Say {EVIL} politely."):
        assert shown in page.text
    assert f"reason {EVIL}" in page.text
    assert "<script" not in path.with_name("report.md").read_text(encoding="utf-8")


def test_page_loads_nothing_from_elsewhere(made: tuple[Comparison, Path]) -> None:
    _, path = made
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|//cdn", source)
    for _, attrs in Page(source).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attrs.get(name) or "#").startswith("#")


def test_every_figure_is_in_the_page_and_beside_it(made: tuple[Comparison, Path]) -> None:
    _, path = made
    page = Page(path.read_text(encoding="utf-8"))
    shown = {attrs["id"] for tag, attrs in page.tags if tag == "figure"}
    assert shown == FIGURES
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    for name in FIGURES:
        data = (path.parent / "figures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5_000


def test_ids_are_unique_and_references_resolve(made: tuple[Comparison, Path]) -> None:
    _, path = made
    source = path.read_text(encoding="utf-8")
    ids = [attrs["id"] for _, attrs in Page(source).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', source)
    assert references
    assert set(references) <= set(ids)


def test_rank_map_shows_the_ranks_of_the_plan(made: tuple[Comparison, Path]) -> None:
    _, path = made
    source = path.read_text(encoding="utf-8")
    start = source.index('<figure id="rank_maps"')
    numbers = re.findall(
        r">(\d+(?:\.\d)?)</text>", source[start : source.index("</figure>", start)]
    )
    # linear_decay-r16-4 over six layers: 16, 13, 11, 8, 6, 4, each in four roles.
    assert {"16", "13", "11", "8", "6", "4"} <= set(numbers)
    assert numbers.count("13") >= 4


def test_json_is_the_comparison(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    values = json.loads(path.with_name("comparison.json").read_text(encoding="utf-8"))
    assert values == comparison.to_dict()
    assert values["headline"] == comparison.headline


def test_same_input_gives_the_same_page(tmp_path: Path) -> None:
    records = study({"uniform-r8": 0.0, "m": -0.1}, range(3))
    comparison = compare(records, baseline="uniform-r8")
    pages = [
        write_report(comparison, records, tmp_path / name, title="t", facts={}).read_bytes()
        for name in ("first", "second")
    ]
    assert pages[0] == pages[1]


def test_a_study_with_one_seed_and_failures_still_reports(tmp_path: Path) -> None:
    records = study({"uniform-r8": 0.0, "m": -0.1}, range(1))
    records.append(failed("broken", 0, "out of memory"))
    comparison = compare(records, baseline="uniform-r8")
    path = write_report(comparison, records, tmp_path, title="t", facts={})
    text = Page(path.read_text(encoding="utf-8")).text
    assert "out of memory" in text
    assert "not compared" in text
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == FIGURES - {"learning_rates"}


def test_markdown_tables_keep_their_columns() -> None:
    comparison = compare(evil_study(), baseline="uniform-r8")
    text = render_markdown(comparison, "Study")
    assert comparison.answer.split(";")[0] in text
    table: list[int] = []
    for line in text.splitlines():
        if line.startswith("|"):
            table.append(len(re.findall(r"(?<!\\)\|", line)))
        elif table:
            assert len(set(table)) == 1
            table = []


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_shows_verdicts_failures_and_brackets_as_text(width: int) -> None:
    comparison = compare(evil_study(), baseline="uniform-r8")
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render_terminal(comparison, console)
    printed = console.file.getvalue()
    assert "Verdict" in printed
    assert "Less than fair" in printed
    assert "failed: uniform-r16, seed 9" in printed
    assert f"Champion: {comparison.winner}" in printed
    assert max(len(line) for line in printed.splitlines()) <= width
    interval = comparison.methods[1].difference.interval
    assert f"{interval.low:+.4f}"[1:] in printed
