"""Intervals over few seeds as a reader gets them: named, the same everywhere, never too sure."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_study import BASE_LOSS, trial

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import Comparison, VerdictKind, compare
from adaptive_lora.analysis.comparison.wording import interval_text
from adaptive_lora.analysis.report import About, render_markdown, render_terminal, write_report
from adaptive_lora.results import TrialRecord


def records_of(values: Sequence[float], parameters: int = 98_304) -> list[TrialRecord]:
    """Return a study whose method differs from the baseline by these values, seed by seed."""
    records = []
    for seed, value in enumerate(values):
        records.append(trial("uniform-r8", seed, BASE_LOSS))
        changes = {"trainable_parameters": parameters}
        records.append(trial("m", seed, BASE_LOSS + value, **changes))
    return records


def compared(values: Sequence[float], margin: float | None = None, parameters: int = 98_304) -> Comparison:
    return compare(records_of(values, parameters), baseline="uniform-r8", margin=margin)


def test_the_headline_after_two_seeds_claims_no_precision() -> None:
    headline = compared((0.0215, 0.0218)).headline
    # By hand: 0.02165 +- 12.706 x 0.00015, since the standard error is half of the difference.
    assert "the 95 % interval (Student's t) allows from +0.0197 to +0.0236" in headline
    assert "With 2 seeds no method could have been shown to be better" in headline


def test_one_seed_has_no_interval_and_says_so() -> None:
    comparison = compared((0.0215,))
    assert "over 1 seed; no interval, since one seed has no standard deviation." in comparison.headline
    assert "no interval: one seed has no standard deviation" in comparison.methods[1].verdict.text
    assert any("no interval over seeds, since one seed" in note for note in comparison.notes)


def test_seeds_that_agree_to_the_digit_have_no_interval() -> None:
    comparison = compared((0.5, 0.5, 0.5))
    assert "no interval, since all 3 seeds gave the same value." in comparison.headline
    records = records_of((0.5, 0.5, 0.5))
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        records.append(trial("n", seed, BASE_LOSS + value))
    mixed = compare(records, baseline="uniform-r8")
    assert "with none for m, since all 3 seeds gave the same value." in mixed.headline
    assert "the 95 % interval (Student's t) allows from" in mixed.headline


def test_folds_are_not_seeds() -> None:
    records = []
    for seed, value in enumerate((0.1, 0.3)):
        for fold, apart in ((0, -0.05), (1, 0.05)):
            records.append(trial("uniform-r8", seed, BASE_LOSS, fold=fold))
            records.append(trial("m", seed, BASE_LOSS + value + apart, fold=fold))
    difference = compare(records, baseline="uniform-r8").methods[1].difference
    assert difference is not None
    expected = stats.t_interval([0.1, 0.3])
    assert difference.interval.low == pytest.approx(expected.low)
    assert difference.interval.high == pytest.approx(expected.high)


def test_equivalence_needs_its_interval_within_the_margin() -> None:
    wide = compared((0.009, -0.009, 0.0095, -0.008, 0.009), margin=0.0101).methods[1]
    tests = wide.difference.margin_tests
    assert tests.equivalent == 1 / 32
    assert tests.interval.high > 0.0101
    assert wide.verdict.kind is VerdictKind.INCONCLUSIVE
    assert "Sign flips put it within the margin of 0.0101 (p 0.0312), but its 90 %" in (wide.verdict.text)
    tight = compared((0.001, -0.001, 0.002, -0.001, 0.001), margin=0.0101).methods[1]
    assert tight.verdict.kind is VerdictKind.EQUIVALENT
    interval = tight.difference.margin_tests.interval
    assert f"90 % interval {interval_text(interval)} by Student's t" in tight.verdict.text


def test_seeds_without_spread_are_equivalent_by_sign_flips_alone() -> None:
    method = compared((0.0,) * 6, margin=0.01).methods[1]
    assert method.verdict.kind is VerdictKind.EQUIVALENT
    assert "no interval: all 6 seeds gave the same value" in method.verdict.text


@pytest.mark.parametrize("seeds", [2, 4, 5, 6, 8])
def test_no_margin_verdict_contradicts_the_interval(seeds: int) -> None:
    kinds = set()
    for study in range(25):
        rng = np.random.default_rng([seeds, study])
        values = rng.normal(rng.uniform(-0.01, 0.01), 0.006, seeds)
        method = compared(values, margin=0.012, parameters=50_000 * (1 + study % 2)).methods[1]
        interval = method.difference.margin_tests.interval
        kinds.add(method.verdict.kind)
        if method.verdict.kind in (VerdictKind.EQUIVALENT, VerdictKind.NON_INFERIOR):
            assert interval.high < 0.012
        if method.verdict.kind is VerdictKind.EQUIVALENT:
            assert interval.low > -0.012
    assert (VerdictKind.NON_INFERIOR in kinds) == (seeds >= 5)


def test_the_same_named_interval_stands_in_every_place(tmp_path: Path) -> None:
    records = records_of((0.01, 0.03, 0.02), parameters=90_000)
    comparison = compare(records, baseline="uniform-r8", margin=0.2)
    difference = comparison.methods[1].difference
    shown = interval_text(difference.interval)
    expected = stats.t_interval(difference.values)
    assert (difference.interval.low, difference.interval.high) == (expected.low, expected.high)
    console = Console(file=io.StringIO(), width=250, color_system=None)
    render_terminal(comparison, console)
    path = write_report(comparison, records, tmp_path, About(title="Study"))
    page = html.unescape(path.read_text(encoding="utf-8"))
    markdown = render_markdown(comparison).replace("\\", "")
    assert f"m: 95 % interval {shown} by Student's t" in page  # the bar of the forest plot
    for text in (console.file.getvalue(), markdown, page):
        assert shown in text
        assert "Student's t" in text
        assert "BCa" not in text
    with next(tmp_path.rglob("*.csv")).open(encoding="utf-8") as file:
        row = list(csv.DictReader(file))[1]
    assert row["interval_method"] == "Student's t"
    assert float(row["interval_low"]) == difference.interval.low
