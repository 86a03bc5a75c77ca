"""Transfer between tasks: ranks allocated on one task, trained on another.

One study per task compares uniform with a method's ranks from the task itself, from every other task,
and from all tasks (one shared allocation), at one parameter budget. The ranks of other tasks are those
of the method's option `profiled_on`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.analysis.comparison.types import jsonable
from adaptive_lora.analysis.comparison.wording import interval_text, signed
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.runner.profiling import OWN
from adaptive_lora.runner.run import run_study
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.runs import single_run

SHARED = "all tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferCell:
    """Comparison of ranks from one task, trained and tested on another, with uniform."""

    allocated_on: str
    """Task of the allocation, or `all tasks` for the shared allocation."""
    trained_on: str
    method: str
    difference: float | None
    """Test loss minus that of uniform, in nats per token, paired by seed; None if not compared."""
    interval: str
    verdict: str
    trainable_parameters: float | None

    @property
    def text(self) -> str:
        """Difference, interval and verdict in one line."""
        return self.verdict if self.difference is None else f"{signed(self.difference)} {self.interval} {self.verdict}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferTable:
    """Result of a transfer study: one cell per pair of tasks."""

    tasks: tuple[str, ...]
    method: str
    cells: tuple[TransferCell, ...]
    studies: Mapping[str, str]
    """Task -> id of its study."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return jsonable(self)

    @property
    def headings(self) -> list[str]:
        """Headings of the table's columns."""
        return ["allocated on", *(f"trained on {task}" for task in self.tasks)]

    def rows(self) -> Iterator[list[str]]:
        """Yield for each task of an allocation its name and the texts of its cells."""
        texts = {(cell.allocated_on, cell.trained_on): cell.text for cell in self.cells}
        for source in (*self.tasks, SHARED):
            yield [source, *(texts[source, task] for task in self.tasks)]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows()]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def print(self, console: Console) -> None:
        """Print the table."""
        table = Table(
            *self.headings,
            title=f"{self.method}: test loss minus uniform's, nats per token",
            header_style="bold",
            box=None,
        )
        for row in self.rows():
            table.add_row(*row)
        console.print(table)


def run_transfer(config: StudyConfig, tasks: Sequence[str], method: str, console: Console) -> TransferTable:
    """Run the study of every task, and combine their comparisons in one table.

    Args:
        config: settings of each study except data and methods.
        tasks: data of each task: files, hub ids or `embedded`.
        method: method that follows an importance profile.
        console: console for progress and the studies' own tables.

    Raises:
        ConfigError: there are fewer than two tasks, two have one name, or the method has no profile or budget.
    """
    names, budget = _names(tasks), _budget(method)
    cells: list[TransferCell] = []
    studies: dict[str, str] = {}
    for data, name in zip(tasks, names, strict=True):
        arms = _arms(method, budget, tasks, data)
        study = dataclasses.replace(
            config,
            study=f"{config.study}-{name}",
            data=dataclasses.replace(config.data, data=data),
            methods=(f"uniform:budget={budget}", *arms.values()),
            baseline=None,
        )
        console.rule(f"trained on {name}")
        result = run_study(study, console).study_result
        studies[name] = result.study_id
        for source, text in arms.items():
            found = result.comparison.method(MethodSpec.parse(text).label)
            difference = found.difference
            cells.append(
                TransferCell(
                    allocated_on=source,
                    trained_on=name,
                    method=found.label,
                    difference=None if difference is None else difference.mean,
                    interval="" if difference is None else interval_text(difference.interval),
                    verdict=str(found.verdict.kind),
                    trainable_parameters=found.parameters.mean,
                )
            )
    label = MethodSpec.parse(method).label
    table = TransferTable(tasks=tuple(names), method=label, cells=tuple(cells), studies=studies)
    _log(table, config)
    return table


def _names(tasks: Sequence[str]) -> list[str]:
    if len(tasks) < 2:
        raise ConfigError(f"transfer needs at least two --data; got {len(tasks)}.")
    names = [PurePath(task).stem for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"transfer needs data of different names; got {', '.join(names)}.")
    for task in tasks:
        if set(task) & set(" ,+:"):
            raise ConfigError(f"data '{task}': no space, comma, colon or plus may be in its path.")
    return names


def _budget(method: str) -> str:
    """Return the budget of all methods: the method's own, or that of uniform at its rank."""
    spec = MethodSpec.parse(method)
    if spec.options.metric is None or not spec.options.is_plain_lora:
        raise ConfigError(
            f"'{method}' follows no importance profile of its own, so nothing could be transferred; "
            "name a method such as empirical or waterfill."
        )
    rank = getattr(spec.options, "rank", None)
    if spec.budget is None and rank is None:
        raise ConfigError(f"'{method}' has no rank; give it a budget, such as budget=uniform-8.")
    return spec.budget or f"uniform-{rank}"


def _arms(method: str, budget: str, tasks: Sequence[str], target: str) -> dict[str, str]:
    """Return task of the allocation -> method text, in the order of the tasks, shared last."""
    base = method if "budget=" in method else f"{method}{',' if ':' in method else ':'}budget={budget}"
    arms = {PurePath(task).stem: base if task == target else f"{base},profiled_on={task}" for task in tasks}
    everything = "+".join(OWN if task == target else task for task in tasks)
    return {**arms, SHARED: f"{base},profiled_on={everything}"}


def _log(table: TransferTable, config: StudyConfig) -> None:
    """Write table and JSON, and log them as a separate run."""
    folder = Path(config.tracking.output) / f"{config.study}-transfer"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table.to_dict(), indent=1, allow_nan=False)
    (folder / "transfer.json").write_text(text + "\n", encoding="utf-8")
    (folder / "transfer.md").write_text(table.markdown(), encoding="utf-8")
    with single_run(connect(config.tracking), "transfer", f"{config.study} transfer") as run:
        run.params({"transfer.tasks": list(table.tasks), "transfer.method": table.method})
        run.tags({f"study_of.{task}": study for task, study in table.studies.items()})
        run.describe(table.markdown())
        run.files(folder, "transfer")
