"""The report as a reader and a browser get it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from html_page import Page
from rich.console import Console
from synthetic_study import EFFECTS, FROZEN_LOSS, failed, scores, study

from adaptive_lora.analysis.comparison import Comparison, compare
from adaptive_lora.analysis.comparison.wording import count, signed
from adaptive_lora.analysis.report import About, figures, loss_figures, render_markdown, render_terminal, write_report
from adaptive_lora.analysis.report.formats import csv_table
from adaptive_lora.analysis.report.style import STYLE, drawn
from adaptive_lora.results import TrialRecord

EVIL = "<script>alert('x')</script>"
RATES = (1e-4, 3e-4, 1e-3)
FACTS = {"command": "adaptive-lora study\n  --seeds 0,1", f"key {EVIL}": f"value {EVIL}"}
FIGURES = {
    "differences",
    "loss_against_served_parameters",
    "loss_against_training_time",
    "rank_maps",
    "budgets",
    "seed_agreement",
    "method_agreement",
    "validation_curves",
    "learning_rates",
    "example_changes",
}


def evil_study() -> list[TrialRecord]:
    effects = {**EFFECTS, f"{EVIL}|$x$": -0.01}
    records = study(effects, range(3), rates=RATES)
    return [*records, failed("uniform-r16", 9, f"reason {EVIL}", lr=3e-4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    records = evil_study()
    comparison = compare(records, baseline="uniform-r8", base_scores=scores(FROZEN_LOSS, 0), facts=FACTS)
    changed = comparison.methods[1].most_changed[0].example_id
    about = About(title=f"Study {EVIL}", examples={changed: f"Say {EVIL} politely."})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "STYLE", STYLE)  # of users, with their fonts
        path = write_report(comparison, records, tmp_path_factory.mktemp("report"), about)
    return comparison, path


def test_what_is_unfair_comes_before_the_answer_and_the_answer_before_the_table(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    text = Page(path.read_text(encoding="utf-8")).text
    places = [text.index(part) for part in (comparison.fairness[0], comparison.answer, "Result", "How to reproduce")]
    assert places == sorted(places)
    for finding in comparison.fairness:
        assert finding in text
    for method in comparison.methods:
        assert method.verdict.text in text


def test_text_from_data_cannot_become_markup(made: tuple[Comparison, Path]) -> None:
    _, path = made
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    scripts = list(page.root.all("script"))
    assert [one.attrs for one in scripts] == [{"type": "application/json", "id": "comparison"}, {}]
    assert source.count("<script") == source.count("</script") == 2
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "link", "img", "form")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for shown in (f"Study {EVIL}", f"key {EVIL}", f"value {EVIL}", f"Say {EVIL} politely."):
        assert shown in page.text
    assert f"reason {EVIL}" in page.text
    assert "<script" not in path.with_name("report.md").read_text(encoding="utf-8")


def test_audit_is_whole_and_its_bad_topics_head_the_page(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root
    alert = next(one for one in root.all("section") if one.attrs.get("role") == "alert")
    bad = {entry.topic for entry in comparison.audit if entry.kind == "bad"}
    heading = next(alert.all("h2")).text
    assert {topic for topic in bad if topic in heading} == bad
    assert len(list(alert.all("li"))) == len(comparison.fairness)
    rows = list(next(root.find("table", "table-fairness-audit").all("tbody")).all("tr"))
    shown = {row.texts[0] + "|" + list(row.all("td"))[1].text for row in rows}
    assert shown == {f"{entry.topic}|{entry.text}" for entry in comparison.audit}


def test_a_fair_study_has_no_alert(tmp_path: Path) -> None:
    records = study({"uniform-r8": 0.0, "m": -0.1}, range(6), rates=RATES)
    comparison = compare(records, baseline="uniform-r8")
    assert not comparison.fairness
    path = write_report(comparison, records, tmp_path, About(title="t"))
    root = Page(path.read_text(encoding="utf-8")).root
    assert not [one for one in root.all("section") if one.attrs.get("role") == "alert"]
    topics = len({entry.topic for entry in comparison.audit})
    assert f"{topics} of {topics} checks fair" in root.text


def test_only_the_pages_own_script_may_run(made: tuple[Comparison, Path]) -> None:
    _, path = made
    page = Page(path.read_text(encoding="utf-8"))
    script = list(page.root.all("script"))[-1].text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [
        attrs["content"] or "" for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_page_carries_its_numbers(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    page = Page(path.read_text(encoding="utf-8"))
    assert json.loads(page.root.find("script", "comparison").text) == comparison.to_dict()


def test_result_table_has_a_row_per_method_with_the_numbers_behind(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    table = Page(path.read_text(encoding="utf-8")).root.find("table", "result")
    head = [one.text for one in next(table.all("thead")).all("th")]
    rows = list(next(table.all("tbody")).all("tr"))
    assert next(table.all("caption")).text == "Result"
    assert [row.attrs["data-m"] for row in rows] == [str(i) for i in range(len(rows))]
    for row, method in zip(rows, comparison.methods, strict=True):
        values = [cell.attrs.get("data-v") for cell in row.all("td")]
        by_name = dict(zip(head[1:], values, strict=True))
        assert next(row.all("th")).text.endswith(method.label)
        assert float(by_name["Test loss"] or "nan") == method.loss.mean
        assert float(by_name["Parameters"] or "nan") == method.parameters.mean
        assert float(by_name["Learning rate"] or "nan") == method.lr
        assert float(by_name["Training time"] or "nan") == method.train_seconds.mean
        answer = head.index("Difference [95 % interval]") - 1
        if method.difference is None:
            assert values[answer] is None
        else:
            assert float(values[answer] or "nan") == method.difference.mean
            interval = method.difference.interval
            assert list(row.all("td"))[answer].text.endswith(f"[{signed(interval.low)}, {signed(interval.high)}]")
            assert float(by_name["p corrected"] or "nan") == method.difference.tests.holm


def test_other_statistics_are_folded_and_their_tables_are_narrow(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root
    folded = root.find("details", "more")
    assert "open" not in folded.attrs
    titles = [next(table.all("caption")).text for table in folded.all("table")]
    assert titles == ["Scores", "Cost and efficiency", "Size of the differences", "Other tests", "Equivalence",
                      "Seeds and examples needed", "Area under the front", "Learning rates"]  # fmt: skip
    for table in root.all("table"):
        assert len(list(next(table.all("thead")).all("th"))) <= 10
    tests = folded.find("table", "table-other-tests")
    head = [one.text for one in next(tests.all("thead")).all("th")]
    for row, method in zip(next(tests.all("tbody")).all("tr"), comparison.methods[1:], strict=True):
        values = dict(zip(head[1:], [cell.attrs.get("data-v") for cell in row.all("td")], strict=True))
        assert method.difference is not None
        found = method.difference.tests
        for name, value in (("p sign flips", found.sign_flip), ("p Wilcoxon", found.wilcoxon)):
            assert float(values[name] or "nan") == value
    text = render_markdown(comparison)
    assert text.index("## Result") < text.index("## Fairness audit") < text.index("<details>")
    assert text.index("<details>") < text.index("### Other tests") < text.index("</details>")


def test_every_method_can_be_picked_and_every_table_is_named(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root
    picker = root.find("fieldset", "picker")
    assert "hidden" in picker.attrs  # of no use without the script, which shows it
    assert [box.attrs["value"] for box in picker.all("input")] == [
        str(place) for place in range(len(comparison.methods))
    ]
    for table in root.all("table"):
        assert next(table.all("caption")).text
    for link in next(root.all("nav")).all("a"):
        assert root.find("h2", (link.attrs["href"] or "").removeprefix("#"))


def test_marks_say_their_numbers(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root
    titles = [title.text for title in root.find("figure", "differences").all("title")]
    for method in comparison.methods[1:]:
        assert method.difference is not None
        for seed, value in zip(method.difference.seeds, method.difference.values, strict=True):
            text = f"{method.label}, seed {seed}: {value:+.4f}".replace(": -", ": \N{MINUS SIGN}")
            assert text in titles
    rates = [title.text for title in root.find("figure", "learning_rates").all("title")]
    assert len(rates) == len(RATES) * len(comparison.methods)
    assert sum(text.endswith("chosen") for text in rates) == len(comparison.methods)


def test_small_frames_can_be_moved(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root
    everyone = ",".join(map(str, range(len(comparison.methods))))
    for name in ("rank_maps", "validation_curves", "learning_rates"):
        svg = next(root.find("figure", name).all("svg"))
        assert svg.attrs["data-order"] == everyone
        assert float(svg.attrs["data-right"] or 0) > 0
        assert float(svg.attrs["data-down"] or 0) > 0
        owners = {part.attrs["data-m"] for part in svg.all("g") if "data-m" in part.attrs}
        assert owners == set(everyone.split(","))


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
        files = path.parent / "figures" / name
        assert files.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        paper = files.with_suffix(".pdf").read_bytes()
        assert paper.startswith(b"%PDF-1.")
        assert b"/FontFile2" in paper  # TrueType, of which text stays text
        assert ElementTree.parse(files.with_suffix(".svg")).getroot().tag.endswith("}svg")


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
    numbers = re.findall(r">(\d+(?:\.\d)?)</text>", source[start : source.index("</figure>", start)])
    # linear_decay-r16-4 over six layers: 16, 13, 11, 8, 6, 4, each in four roles.
    assert {"16", "13", "11", "8", "6", "4"} <= set(numbers)
    assert numbers.count("13") >= 4


def test_agreement_cells_and_budget_bars_say_the_comparisons_numbers(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    root = Page(path.read_text(encoding="utf-8")).root

    def texts(name: str) -> list[str]:
        return [title.text for title in root.find("figure", name).all("title")]

    for one in comparison.agreements:
        shown = texts("seed_agreement" if one.kind == "seeds" else "method_agreement")
        about = f"{one.about}: " if one.about else ""
        for first, row in zip(one.labels, one.matrix, strict=True):
            for second, value in zip(one.labels, row, strict=True):
                said = "nothing is ordered" if value is None else signed(value, 2)
                assert f"{about}{first} and {second}: {said}" in shown
    bars = texts("budgets")
    assert len(bars) == sum(len(one.layers) * len(one.roles) for one in comparison.budgets)
    one = comparison.budgets[1]
    share = 100 * one.shares[2][one.roles.index("qkv")]
    assert f"{one.method}, layer {one.layers[2]}, qkv: {share:.1f} % of its parameters" in bars
    points = texts("loss_against_served_parameters")
    front = next(front for front in comparison.fronts if front.cost == "served parameters")
    for point in front.points:
        (said,) = [text for text in points if text.startswith(f"{point.method}: test loss")]
        assert f"test loss {point.loss:.4f}" in said
        assert f"{count(point.cost)} parameters" in said
        assert ("on the front" in said) == point.on_front


def test_markdown_shows_the_figures_beside_it(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    text = path.with_name("report.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[.+\]\((.+)\)", text)
    assert {Path(image).stem for image in images} == FIGURES
    assert all((path.parent / image).is_file() for image in images)
    assert text.startswith(render_markdown(comparison, f"Study {EVIL}").rstrip())


def test_trained_parameters_and_memory_are_drawn_where_they_differ(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(
            record,
            metrics={
                **record.metrics,
                "training_parameters": record.trainable_parameters * (2 if own == "m" else 1),
                "peak_memory_bytes": (3 if own == "m" else 2) * 2.0**30,
            },
        )
        for record in study({"uniform-r8": 0.0, "m": -0.1}, range(3))
        for own in [record.method]
    ]
    comparison = compare(records, baseline="uniform-r8")
    path = write_report(comparison, records, tmp_path, About(title="t"))
    root = Page(path.read_text(encoding="utf-8")).root
    trained = int(2 * (comparison.method("m").parameters.mean or 0))
    for name, amount in (
        ("loss_against_trained_parameters", f"{trained:,} parameters"),
        ("loss_against_peak_memory", "3 GiB"),
    ):
        texts = [title.text for title in root.find("figure", name).all("title")]
        (said,) = [text for text in texts if text.startswith("m: test loss")]
        assert f", {amount}" in said
    caption = next(root.find("figure", "loss_against_peak_memory").all("figcaption")).text
    (note,) = [front.note for front in comparison.fronts if front.cost == "peak memory"]
    assert note in caption


def test_json_is_the_comparison(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    values = json.loads(path.with_name("comparison.json").read_text(encoding="utf-8"))
    assert values == comparison.to_dict()
    assert values["headline"] == comparison.headline


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    labels = dict.fromkeys(("uniform-r8", "linear_decay-r16-4", "empirical-r8-x"), 0.0)
    records = study(labels, range(3), rates=RATES)
    folders = []
    for name in ("first", "second"):
        comparison = compare(records, baseline="uniform-r8")
        write_report(comparison, records, tmp_path / name, About(title="t"))
        folders.append(tmp_path / name)
    written = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert len(written[0]) == 6 + 3 * len(FIGURES)
    for name, data in written[0].items():
        assert written[1][name] == data, name


def test_a_study_with_one_seed_and_failures_still_reports(tmp_path: Path) -> None:
    records = study({"uniform-r8": 0.0, "m": -0.1}, range(1))
    records.append(failed("broken", 0, "out of memory"))
    comparison = compare(records, baseline="uniform-r8")
    path = write_report(comparison, records, tmp_path, About(title="t"))
    text = Page(path.read_text(encoding="utf-8")).text
    assert "out of memory" in text
    assert "not compared" in text
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == FIGURES - {
        "learning_rates",  # one rate
        "seed_agreement",  # one seed
        "method_agreement",  # nothing but uniform ranks
        "loss_against_served_parameters",  # all alike
        "loss_against_training_time",
    }


@pytest.mark.parametrize(
    "records",
    [
        [*study({"uniform-r8": 0.0}, range(3)), failed("broken", 0, "out of memory")],
        study({"uniform-r8": 0.0}, range(1)),
        study({"uniform-r8": 0.0, "m": 0.0}, range(2), folds=(0, 1), noise=0.0),
        [
            dataclasses.replace(record, plan={}, validation_curve=(), metrics={}, settings={})
            for record in study({"uniform-r8": 0.0, "m": 0.1}, range(2))
        ],
    ],
    ids=["nothing to compare", "baseline alone", "folds without spread", "little recorded"],
)
def test_poor_studies_report_too(records: list[TrialRecord], tmp_path: Path) -> None:
    comparison = compare(records, baseline="uniform-r8")
    path = write_report(comparison, records, tmp_path, About(title="t"))
    root = Page(path.read_text(encoding="utf-8")).root
    assert next(root.all("h1")).text == comparison.answer
    rows = list(next(root.find("table", "result").all("tbody")).all("tr"))
    assert len(rows) == len(comparison.methods)
    assert not re.search(r"\bnan\b|\bNone\b", next(root.all("main")).text)


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


@pytest.mark.parametrize("width", [80, 120, 180])
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
    rows = [line for line in printed.splitlines() if line.startswith("┃")]
    assert all(line.rstrip().endswith("┃") for line in rows)  # no column is cut off
    interval = comparison.methods[1].difference.interval
    assert f"{interval.low:+.4f}"[1:] in printed


def test_of_many_methods_figures_and_terminal_show_the_best_and_tables_all() -> None:
    effects = {f"uniform-r{rank}": 0.05 * rank for rank in range(1, 41)}
    records = [*study(effects, range(2)), *(failed("uniform-r2", seed, "diverged") for seed in range(50, 75))]
    comparison = compare(records, baseline="uniform-r40")
    best = {f"uniform-r{rank}" for rank in range(1, 32)} | {"uniform-r40"}
    assert set(drawn(comparison)) == best
    figure = loss_figures.differences(comparison)
    assert figure is not None
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert best - {"uniform-r40"} <= shown
    assert "uniform-r32" not in shown
    console = Console(file=io.StringIO(), width=200)
    render_terminal(comparison, console)
    printed = console.file.getvalue()
    assert "uniform-r31" in printed
    assert "Shown are 32 of 40 methods" in printed
    assert printed.count("failed: uniform-r2") == 20
    assert "5 more, in the report" in printed
    assert len(csv_table(comparison).splitlines()) == 41
