"""Studies of planted teachers: rates within the grid, draws compared together, and one table of all patterns."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.analysis.comparison import Comparison, VerdictKind
from adaptive_lora.analysis.comparison.wording import ABSENT, confidence_text, interval_text, whole_percent
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.config.sections import TrackingConfig
from adaptive_lora.errors import DataError
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


Cell = Sequence[tuple[PlantedTeacher, StudyConfig]]
"""Teachers of one pattern and spectrum, each with its study."""


class PlantedRuns:
    """The studies of planted teachers, one after the other."""

    def __init__(self, output: str, console: Console) -> None:
        """Start without studies."""
        self._output, self._console = output, console
        self.found: list[tuple[str, StudyResult]] = []
        """Teachers, as text, and result of each study and of each comparison of several."""

    def compared(self, tuning: Cell, cell: Cell) -> StudyResult:
        """Run the studies of a cell; return the result of the only one, or of all together.

        Args:
            tuning: teachers on which each method's learning rate is chosen; empty: each teacher has rates of its own.
            cell: teachers to compare methods on.
        """
        tuned = [self._kept(str(teacher), run_tuned(study, self._console)) for teacher, study in tuning]
        rates = rates_over([result.comparison for result in tuned])
        how = "each method at the rate chosen for each teacher"
        if tuned:
            listed = ", ".join(f"{label} {lr:g}" for label, lr in rates.items())
            names = " and ".join(str(teacher.draw) for teacher, _ in tuning)
            how = f"learning rates, chosen on draw {names} and kept: {listed}"
            self._console.print(shown(how), highlight=False)
        results = [
            self._kept(
                str(teacher), run_at_rates(study, rates, self._console) if tuned else run_tuned(study, self._console)
            )
            for teacher, study in cell
        ]
        if len(results) == 1:
            return results[0]
        together = compare_together(cell[0][1].tracking, results, self._output, how, self._console)
        return self._kept(" and ".join(str(teacher) for teacher, _ in cell), together)

    def _kept(self, data: str, result: StudyResult) -> StudyResult:
        self.found.append((data, result))
        path = shown(result.report().resolve())
        self._console.print(f"[bold]report[/]    {path}", highlight=False, soft_wrap=True)
        return result


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


def rates_over(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Return the label of each method -> its learning rate of the lowest mean validation loss over studies.

    Rates that a race stopped in a study count only where no rate was trained to the end in more studies.
    """
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method in (method for comparison in comparisons for method in comparison.methods):
        for rate in method.rates:
            if rate.lr is not None and rate.validation.mean is not None:
                losses[method.label][rate.lr].append(rate.validation.mean)
    return {
        label: min(found, key=lambda lr: (-len(found[lr]), fmean(found[lr]), lr)) for label, found in losses.items()
    }


def run_at_rates(config: StudyConfig, rates: Mapping[str, float], console: Console) -> StudyResult:
    """Run a study with one learning rate for each method, by label."""
    specs = [MethodSpec.parse(text) for text in config.methods]
    if failed := sorted({spec.label for spec in specs} - set(rates)):
        raise DataError(f"{failed[0]}: required a trial that finished on the draws to tune on; every one failed.")
    methods = [
        text if spec.lr else MethodSpec.with_option(text, "lr", f"{rates[spec.label]:.12g}")
        for text, spec in zip(config.methods, specs, strict=True)
    ]
    chosen = tuple(sorted({rates[spec.label] for spec in specs}))
    config = dataclasses.replace(config, methods=tuple(methods), lr=chosen, race=False)
    return run_study(config, console).study_result


def compare_together(
    tracking: TrackingConfig, studies: Sequence[StudyResult], output: str, rates: str, console: Console
) -> StudyResult:
    """Compare studies of several teachers in pairs of one teacher and seed, and return the result.

    Each method is taken at the rate that it chose for each teacher; `rates` are the report's words on that. The margin
    is the mean of the studies' own, since there is no one frozen base to take it from.
    """
    margins = [study.comparison.margin.value for study in studies]
    known = [margin for margin in margins if margin is not None]
    changes = {"output": output, **({"margin": sum(known) / len(known)} if len(known) == len(margins) else {})}
    ids = tuple(study.study_id for study in studies)
    return compare_study(tracking, Selection(study_ids=ids, allow_mixed=True, own_rates=rates), changes, console)[0]


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
