"""Headroom of planted ranks, and the share of it that methods recover, with its interval."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_study import BASE_LOSS, study

from adaptive_lora.analysis.comparison import Comparison, compare
from adaptive_lora.analysis.comparison.headroom import SEPARATING, headroom_of
from adaptive_lora.analysis.report import render_markdown
from adaptive_lora.analysis.report.figures import draw_cells
from adaptive_lora.analysis.report.planted_figures import recovered, recovered_of
from adaptive_lora.analysis.stats import FIELLER, ratio_of_means, t_interval
from adaptive_lora.results import TrialRecord
from adaptive_lora.runner.comparison_input import _at_own_rates
from adaptive_lora.runner.planted import print_table, rates_beyond, rows_of

BASE, ORACLE, METHOD = "uniform-r8", "linear_decay-r16-4", "three_band-r16"


def compared(
    oracle: float = -0.6, method: float = -0.3, noise: float = 0.01, seeds: int = 8
) -> tuple[Comparison, list[TrialRecord]]:
    records = study({BASE: 0.0, ORACLE: oracle, METHOD: method}, range(seeds), noise)
    found = compare(records, baseline=BASE, margin=0.01)
    return dataclasses.replace(found, headroom=headroom_of(found, records, ORACLE)), records


def test_the_interval_of_a_ratio_holds_the_ratios_that_a_t_test_keeps() -> None:
    rng = np.random.default_rng(0)
    below = 1 + rng.normal(0, 0.2, 6)
    above = 0.4 * below + rng.normal(0, 0.1, 6)
    ratio, interval = ratio_of_means(above, below)
    assert ratio == pytest.approx(above.mean() / below.mean())
    assert interval.method == FIELLER
    for end, sign in ((interval.low, 1), (interval.high, -1)):
        assert end is not None
        kept = t_interval(above - end * below)  # reaches 0 exactly where the ratio is an end
        assert (kept.low if sign > 0 else kept.high) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("pairs", [3, 8])
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_the_interval_of_a_ratio_covers_as_often_as_it_says(pairs: int, gain: float) -> None:
    """Pairs that share half of their noise; a gain of one standard deviation gives many unbounded intervals."""
    rng = np.random.default_rng(1)
    studies, truth, held, bounded = 1500, 0.6, 0, 0
    for _ in range(studies):
        shared = rng.normal(0, 1, pairs)
        below = gain + (shared + rng.normal(0, 1, pairs)) / math.sqrt(2)
        above = truth * gain + (shared + rng.normal(0, 1, pairs)) / math.sqrt(2)
        _, interval = ratio_of_means(above, below)
        known = interval.low is not None and interval.high is not None
        bounded += known
        held += not known or interval.low <= truth <= interval.high  # type: ignore[operator]
    assert held / studies >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / studies)
    if gain == 4 and pairs == 8:
        assert bounded == studies
        assert held / studies <= 0.95 + 3 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize(
    ("above", "below", "note"),
    [
        ([1.0], [2.0], "one seed"),
        ([1.0, 2.0], [0.0, 0.0], "is 0"),
        ([1.0, 2.0, 1.5], [0.1, -0.1, 0.05], "cannot be told from 0"),
        ([1.0, 2.0], [2.0, 4.0], "same value"),
    ],
)
def test_a_ratio_without_an_interval_says_why(above: list[float], below: list[float], note: str) -> None:
    _, interval = ratio_of_means(above, below)
    assert interval.low is None
    assert note in interval.note


def test_headroom_is_the_oracles_share_and_says_whether_methods_can_be_told_apart() -> None:
    comparison, _ = compared()
    cell = comparison.headroom
    assert cell is not None
    assert cell.share == pytest.approx(0.6 / BASE_LOSS, abs=0.02)
    assert cell.interval.low < cell.share < cell.interval.high  # type: ignore[operator]
    assert cell.separates is (cell.share >= SEPARATING)
    rows = {row.method: row for row in cell.methods}
    assert rows[ORACLE].recovered == pytest.approx(1)
    assert rows[METHOD].recovered == pytest.approx(0.5, abs=0.03)
    assert rows[METHOD].interval.method == FIELLER
    weak = compared(oracle=-0.001, noise=0.05)[0].headroom
    assert weak is not None
    assert not weak.separates
    assert "this data cannot" in weak.text
    few = compared(oracle=-0.9, seeds=1)[0].headroom
    assert few is not None
    assert not few.separates
    assert few.text.endswith("whether methods can be told apart is open.")
    assert next(row for row in weak.methods if row.method == METHOD).interval.low is None
    assert compared(oracle=-0.9)[0].headroom.text.endswith("methods can be told apart.")  # type: ignore[union-attr]


def test_planted_ranks_that_are_uniform_leave_nothing_to_recover() -> None:
    records = study({BASE: 0.0, "uniform-r8-copy": 0.0, METHOD: 0.1}, range(6))
    found = compare(records, baseline=BASE, margin=0.01)
    cell = headroom_of(found, records, "uniform-r8-copy")
    assert cell is not None
    assert cell.share == 0
    assert not cell.separates
    assert "equivalence" in cell.text
    assert all(row.recovered is None for row in cell.methods)
    assert recovered([("flat", cell)]) is None
    assert headroom_of(found, records, "planted-late-r2") is None


def test_cost_counts_profile_and_search() -> None:
    records = study({BASE: 0.0, ORACLE: -0.6}, range(3))
    dear = [
        dataclasses.replace(one, metrics={"train_seconds": 10.0, "profile/seconds": 5.0, "search_seconds": 20.0})
        for one in records
    ]
    cell = headroom_of(compare(dear, baseline=BASE), dear, ORACLE)
    assert cell is not None
    assert cell.methods[0].trainings == pytest.approx(3.5)


def test_report_and_table_show_headroom_and_recovery(tmp_path: Path) -> None:
    comparison, _ = compared(oracle=-0.9)
    assert comparison.to_dict()["headroom"]["oracle"] == ORACLE
    assert "headroom" not in dataclasses.replace(comparison, headroom=None).to_dict()
    assert comparison.headline.startswith("Headroom:")
    text = render_markdown(comparison)
    assert "Planted ranks" in text
    assert "Cost in trainings" in text
    rows = rows_of("late", comparison)
    console = Console(file=io.StringIO(), width=160)
    print_table(rows, 0.95, console)
    assert "recovered % [95 %]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [row.method for row in rows] == [ORACLE, METHOD]
    assert recovered_of(comparison) is not None
    assert recovered_of(dataclasses.replace(comparison, headroom=None)) is None
    figure = draw_cells([("late", comparison), ("early", comparison)], tmp_path / "new")
    assert figure is not None
    assert figure.stat().st_size > 10_000
    assert draw_cells([("late", dataclasses.replace(comparison, headroom=None))], tmp_path) is None


def test_a_grid_is_extended_where_a_chosen_rate_is_at_its_end() -> None:
    grid = (2e-3, 4e-3, 8e-3)
    comparison = compare(study({BASE: 0.0, METHOD: -0.1}, range(2), rates=grid), baseline=BASE)
    assert rates_beyond(comparison, grid) == []
    assert rates_beyond(comparison, grid[1:]) == [2e-3]
    assert rates_beyond(comparison, grid[:2]) == [8e-3]
    assert rates_beyond(comparison, grid[1:2]) == []


def test_teachers_compared_together_have_each_their_own_rates() -> None:
    def teacher(digest: str, middle: float) -> list[TrialRecord]:
        rates = (middle / 2, middle, 2 * middle)
        return [
            dataclasses.replace(one, tags={**one.tags, "data_digest": digest})
            for one in study({BASE: 0.0, METHOD: -0.1}, (0,), rates=rates)
        ]

    together = _at_own_rates([*teacher("a", 4e-3), *teacher("b", 8e-3)])
    assert [one.run_id.rpartition("-")[2] for one in together] == ["0.004", "0.004", "0.008", "0.008"]
    assert {one.lr for one in together} == {None}
