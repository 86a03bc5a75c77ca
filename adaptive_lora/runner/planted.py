"""Studies of planted teachers: rates within the grid, draws compared together, and one table of all patterns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from adaptive_lora.analysis.comparison import Comparison, VerdictKind
from adaptive_lora.analysis.comparison.wording import ABSENT, confidence_text, interval_text, whole_percent
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.sections import TrackingConfig
from adaptive_lora.redaction import shown
from adaptive_lora.runner.comparison_input import Selection
from adaptive_lora.runner.result import StudyResult
from adaptive_lora.runner.run import compare_study, run_study

FACTOR, MOST_RATES = 2.0, 9
"""Ratio of a further learning rate to the end of the grid, and rates beyond which the grid is not extended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedRow:
    """One method on one pattern."""

    pattern: str
    method: str
    trials: int
    """Number of pairs, each of one teacher and seed."""
    headroom: float
    """Gain of the planted ranks as a share of uniform's loss."""
    headroom_interval: Interval
    separates: bool
    """Mark of a pattern on which methods can be told apart."""
    recovered: float | None
    """Share of that gain; None where the planted ranks gain nothing."""
    interval: Interval
    verdict: VerdictKind
    """Verdict against uniform."""
    trainings: float | None
    """Cost of one trial with its profile and search, in trainings."""
    lr: float | None
    """Its learning rate; None where studies pooled here chose different ones."""


def run_tuned(config: StudyConfig, console: Console) -> StudyResult:
    """Run a study; extend its grid of learning rates while a method's is at its end.

    All methods get the same grid. One rate is not extended.
    """
    while True:
        result = run_study(config, console).study_result
        further = rates_beyond(result.comparison, config.lr)
        if not further or len(config.lr) + len(further) > MOST_RATES:
            return result
        listed = ", ".join(f"{lr:g}" for lr in further)
        console.print(f"learning rates: one that was chosen is at the end of the grid; adding {listed}")
        config = dataclasses.replace(config, lr=tuple(sorted((*config.lr, *further))))


def compare_together(
    tracking: TrackingConfig, studies: Sequence[StudyResult], output: str, console: Console
) -> StudyResult:
    """Compare studies of several teachers in pairs of one teacher and seed, and return the result.

    Each method is taken at the rate that it chose for each teacher. The margin is the mean of the studies' own, since
    there is no one frozen base to take it from.
    """
    margins = [study.comparison.margin.value for study in studies]
    known = [margin for margin in margins if margin is not None]
    changes = {"output": output, **({"margin": sum(known) / len(known)} if len(known) == len(margins) else {})}
    ids = tuple(study.study_id for study in studies)
    return compare_study(tracking, Selection(study_ids=ids, allow_mixed=True, own_rates=True), changes, console)[0]


def rates_beyond(comparison: Comparison, grid: Sequence[float]) -> list[float]:
    """Return the rates that follow the ends of a grid which a method has chosen."""
    if len(grid) < 2:
        return []
    chosen = {method.lr for method in comparison.methods}
    low, high = min(grid), max(grid)
    return [float(f"{lr:.6g}") for end, lr in ((low, low / FACTOR), (high, high * FACTOR)) if end in chosen]


def rows_of(pattern: str, comparison: Comparison) -> list[PlantedRow]:
    """Return the rows of a pattern; empty where the planted ranks could not be compared."""
    cell = comparison.headroom
    if cell is None:
        return []
    return [
        PlantedRow(
            pattern=pattern,
            method=row.method,
            trials=cell.trials,
            headroom=cell.share,
            headroom_interval=cell.interval,
            separates=cell.separates,
            recovered=row.recovered,
            interval=row.interval,
            verdict=row.verdict,
            trainings=row.trainings,
            lr=comparison.method(row.method).lr,
        )
        for row in cell.methods
    ]


def print_table(rows: Iterable[PlantedRow], confidence: float, console: Console) -> None:
    """Print one line for each pattern and method."""
    level = confidence_text(confidence)
    heads = ("pattern", "pairs", f"headroom % [{level}]", "method", f"recovered % [{level}]", "verdict", "trainings")
    table = Table(*heads, header_style="bold", box=None)
    for row in rows:
        cost = ABSENT if row.trainings is None else f"{row.trainings:.2f}"
        headroom = _share(row.headroom, row.headroom_interval) + ("" if row.separates else " (not shown to separate)")
        share = _share(row.recovered, row.interval)
        table.add_row(row.pattern, str(row.trials), headroom, shown(row.method), share, str(row.verdict), cost)
    console.print(table)


def _share(share: float | None, interval: Interval) -> str:
    bracket = interval_text(interval, whole_percent)
    return ABSENT if share is None else f"{whole_percent(share)} {bracket if bracket != ABSENT else ''}".strip()
