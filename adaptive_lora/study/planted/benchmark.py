"""The planted benchmark: a base with a hidden low-rank change, and who finds where it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive_lora.analysis.comparison.wording import interval_methods, interval_text, p_text, signed
from adaptive_lora.analysis.report.forest_grid import ForestRow, forest_grid
from adaptive_lora.config import TrackingConfig
from adaptive_lora.study.planted.cell import CellResult, Planter
from adaptive_lora.study.planted.config import PlantedConfig
from adaptive_lora.study.planted.findings import Finding, Outcome, PlantedFindings, conclude
from adaptive_lora.study.progress import say_place
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.runs import single_run


def run_planted(config: PlantedConfig, tracking: TrackingConfig, console: Console) -> PlantedFindings:
    """Run what is missing of the benchmark, log it, and write table, JSON and figure.

    Interrupted benchmarks continue: every method's result in every cell is kept in the output
    folder under a digest of all that it depends on.

    Raises:
        AdaptiveLoraError: base or budget cannot be used, or the tracking store is unreachable.
    """
    planter = Planter(config)
    store = connect(tracking)
    say_place(store, console)
    cells = list(planter.cells())
    results: list[CellResult] = []
    for number, (pattern, spectrum, seed) in enumerate(cells, start=1):

        def done(result: CellResult, number: int = number) -> None:
            console.print(
                f"[dim]cell {number}/{len(cells)}[/] {result.pattern} {result.spectrum} "
                f"seed {result.seed} {result.method:<36} KL {result.kl:.4f} of "
                f"{result.base_kl:.4f}  {result.seconds:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

        results += planter.run(pattern, spectrum, seed, done)
    found = conclude(results)
    folder = Path(config.output) / "planted"
    _write(found, results, config, folder)
    with single_run(store, "planted", "planted benchmark") as run:
        run.params({f"planted.{key}": value for key, value in _settings(config).items()})
        for finding in found.findings:
            name = f"{finding.pattern}.{finding.spectrum}/{finding.method}".replace("@", "_")
            run.metric(f"planted/{name}/difference", finding.difference)
        run.flush()
        run.files(folder, "planted")
    return found


def _settings(config: PlantedConfig) -> dict[str, Any]:
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None and field.name != "output"
    }


def _write(found: PlantedFindings, results: list[CellResult], config: PlantedConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "settings": _settings(config),
        **found.to_dict(),
        "cells": [dataclasses.asdict(result) for result in results],
    }
    (folder / "planted.json").write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "planted.md").write_text(markdown(found), encoding="utf-8")
    groups: dict[str, list[ForestRow]] = {}
    for finding in found.findings:
        groups.setdefault(f"{finding.pattern}\n{finding.spectrum} spectrum", []).append(
            ForestRow(
                label=finding.method,
                value=finding.difference,
                low=finding.interval.low,
                high=finding.interval.high,
                tone=_TONES[finding.outcome],
            )
        )
    forest_grid(
        groups,
        f"KL to the teacher, method minus uniform: nats per token,\n{_interval_kind(found)}; left is better",
        folder / "planted.png",
    )


_TONES = {Outcome.BETTER: "better", Outcome.WORSE: "worse", Outcome.OPEN: "open"}
_HEADINGS = (
    "pattern",
    "spectrum",
    "method",
    "KL",
    "difference to uniform",
    "95 % interval",
    "p",
    "corrected",
    "recovered",
    "rank correlation",
    "energy",
    "outcome",
)


def _interval_kind(found: PlantedFindings) -> str:
    """Return the level and the method of the intervals."""
    methods = interval_methods(finding.interval for finding in found.findings)
    return f"95 % interval over seeds ({methods or 'none: no spread'})"


def _row(finding: Finding) -> tuple[str, ...]:
    def or_none(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    return (
        finding.pattern,
        finding.spectrum,
        finding.method,
        f"{finding.kl:.4f}",
        signed(finding.difference),
        interval_text(finding.interval),
        p_text(finding.p),
        p_text(finding.p_corrected),
        or_none(finding.recovered, ".0%"),
        or_none(finding.rank_correlation, ".2f"),
        f"{finding.captured_energy:.0%}",
        str(finding.outcome),
    )


def markdown(found: PlantedFindings) -> str:
    """Return the table and the sentences as Markdown."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(_row(finding)) + " |" for finding in found.findings]
    lines += ["", f"{_interval_kind(found)}."]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in found.sentences)]) + "\n"


def print_findings(found: PlantedFindings, console: Console) -> None:
    """Print the table and the verdict in words."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for finding in found.findings:
        table.add_row(*_row(finding))
    console.print(table)
    console.print(f"{_interval_kind(found)}.", highlight=False, soft_wrap=True)
    for sentence in found.sentences:
        console.print(sentence, highlight=False, soft_wrap=True)
