"""Transfer between tasks: ranks allocated on one task, trained on another.

One study per task compares uniform with a method's ranks from the task itself, from every other task,
and from all tasks (one shared allocation), at one parameter budget.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.analysis.comparison import Comparison, MethodSummary
from adaptive_lora.analysis.comparison.types import jsonable
from adaptive_lora.analysis.comparison.wording import interval_text, signed
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.study.profiling import OWN
from adaptive_lora.study.run import run_study
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferTable:
    """Result of a transfer study: one cell per pair of tasks."""

    tasks: tuple[str, ...]
    method: str
    cells: tuple[TransferCell, ...]
    studies: Mapping[str, str]
    """Task -> id of its study."""

    def cell(self, allocated_on: str, trained_on: str) -> TransferCell:
        """Return one cell."""
        return next(c for c in self.cells if (c.allocated_on, c.trained_on) == (allocated_on, trained_on))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return jsonable(self)


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
    names = _names(tasks)
    spec = MethodSpec.parse(method)
    budget = _budget(spec, method)
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
        study_result = run_study(study, console).study_result
        studies[name] = study_result.study_id
        labels = {source: MethodSpec.parse(text).label for source, text in arms.items()}
        cells += [_cell(source, name, study_result.comparison, label) for source, label in labels.items()]
    table = TransferTable(tasks=tuple(names), method=spec.label, cells=tuple(cells), studies=studies)
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


def _budget(spec: MethodSpec, text: str) -> str:
    """Return the budget of all methods: the method's own, or that of uniform at its rank."""
    if spec.options.metric is None or not spec.options.is_plain_lora:
        raise ConfigError(
            f"'{text}' follows no importance profile of its own, so nothing could be transferred; "
            "name a method such as empirical or waterfill."
        )
    rank = getattr(spec.options, "rank", None)
    if spec.budget is None and rank is None:
        raise ConfigError(f"'{text}' has no rank; give it a budget, such as budget=uniform-8.")
    return spec.budget or f"uniform-{rank}"


def _arms(method: str, budget: str, tasks: Sequence[str], target: str) -> dict[str, str]:
    """Return task of the allocation -> method text, in the order of the tasks, shared last."""
    joint = ":" if ":" not in method else ","
    base = method if "budget=" in method else f"{method}{joint}budget={budget}"
    arms = {PurePath(task).stem: base if task == target else f"{base},profiled_on={task}" for task in tasks}
    everything = "+".join(OWN if task == target else task for task in tasks)
    return {**arms, SHARED: f"{base},profiled_on={everything}"}


def _cell(source: str, target: str, comparison: Comparison, label: str) -> TransferCell:
    found: MethodSummary = comparison.method(label)
    difference = found.difference
    return TransferCell(
        allocated_on=source,
        trained_on=target,
        method=label,
        difference=None if difference is None else difference.mean,
        interval="" if difference is None else interval_text(difference.interval),
        verdict=str(found.verdict.kind),
        trainable_parameters=found.parameters.mean,
    )


def markdown(table: TransferTable) -> str:
    """Return the table with sources as rows and tasks as columns."""
    head = ["allocated on", *(f"trained on {task}" for task in table.tasks)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for source in (*table.tasks, SHARED):
        row = [source, *(cell_text(table.cell(source, task)) for task in table.tasks)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def cell_text(cell: TransferCell) -> str:
    """Return difference, interval and verdict in one line."""
    if cell.difference is None:
        return cell.verdict
    return f"{signed(cell.difference)} {cell.interval} {cell.verdict}"


def print_table(table: TransferTable, console: Console) -> None:
    """Print the transfer table."""
    shown = Table(title=f"{table.method}: test loss minus uniform's, nats per token", header_style="bold", box=None)
    shown.add_column("allocated on")
    for task in table.tasks:
        shown.add_column(f"trained on {task}")
    for source in (*table.tasks, SHARED):
        shown.add_row(source, *(cell_text(table.cell(source, task)) for task in table.tasks))
    console.print(shown)


def _log(table: TransferTable, config: StudyConfig) -> None:
    """Write table and JSON, and log them as a separate run."""
    folder = Path(config.tracking.output) / f"{config.study}-transfer"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table.to_dict(), indent=1, allow_nan=False)
    (folder / "transfer.json").write_text(text + "\n", encoding="utf-8")
    (folder / "transfer.md").write_text(markdown(table), encoding="utf-8")
    with single_run(connect(config.tracking), "transfer", f"{config.study} transfer") as run:
        run.params({"transfer.tasks": list(table.tasks), "transfer.method": table.method})
        run.tags({f"study_of.{task}": study for task, study in table.studies.items()})
        run.describe(markdown(table))
        run.files(folder, "transfer")
