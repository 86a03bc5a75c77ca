"""`study`, `compare` and `transfer`: run the grid of trials, compare trials, transfer ranks between tasks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.cli.early import require_data, require_inputs
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import (
    AS_JSON,
    STUDY_FILE,
    Option,
    make_console,
    method_option,
    options,
    read_study,
    settings,
    settings_given,
)
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.redaction import shown

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_lora.study.result import StudyResult
    from adaptive_lora.tracking import Store


@main.command()
@options(STUDY_FILE, *settings())
def study(file: Path | None, **given: Any) -> None:
    """Run a whole study: profile, train, evaluate, compare, register the winner.

    After an interruption, run the same command again to continue.
    """
    config = read_study(file, given)
    require_inputs(config)
    from adaptive_lora.study.run import run_study

    console = make_console()
    outcome = run_study(config, console)
    _print_result(console, outcome.study_result, outcome.store)


def _print_result(console: Console, result: StudyResult, store: Store) -> None:
    champion = result.champion
    if champion is None:
        registered = f"[red]nothing registered: {shown(result.no_champion)}[/]"
    else:
        registered = (
            f"models:/{champion.name}@champion is version {champion.version} "
            f"({shown(result.comparison.winner)}); reloaded and equal"
        )
    for line in (
        f"\n[bold]report[/]    {shown(result.report.resolve())}",
        f"[bold]registry[/]  {registered}",
        f"[bold]tracking[/]  adaptive-lora ui --tracking-uri {shown(store.shown_uri)}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


_COMPARED = (
    "tracking_uri", "experiment", "output", "registered_model", "trust_remote_code", "baseline", "margin",
    "margin_percent", "correction",
)  # fmt: skip
"""Study settings that affect a comparison."""


@main.command()
@options(
    Option(
        "study",
        "--study-id",
        "study_ids",
        multiple=True,
        metavar="ID",
        help="ids of studies [default: the latest study]",
    ),
    Option(
        "study",
        "--query",
        metavar="FILTER",
        help="filter of trials in MLflow's syntax, such as \"tags.data = 'rows.json'\" [default: none]",
    ),
    Option(
        "study",
        "--allow-mixed",
        is_flag=False,
        flag_value="true",
        type=bool,
        default="false",
        help="compare across data sets, splits and bases, pairing only within each [default: false]",
    ),
    *settings(only=_COMPARED),
    AS_JSON,
)
def compare(study_ids: tuple[str, ...], query: str | None, allow_mixed: bool, as_json: bool, **given: Any) -> None:
    """Compare finished trials, write the report, register the winner.

    Everything is read from the tracking store, also trials that others ran. Only the proof before
    a registration needs the base model and the data.
    """
    given = settings_given(given)
    tracking = study_from({**given, "baseline": None}).tracking
    require_reachable(tracking, must_exist=True)
    from adaptive_lora.study.comparison_input import Selection
    from adaptive_lora.study.run import compare_study

    console = make_console(as_json=as_json)
    selection = Selection(
        study_ids=tuple(" ".join(study_ids).replace(",", " ").split()), query=query, allow_mixed=allow_mixed
    )
    result, store = compare_study(tracking, selection, given, console)
    if as_json:
        click.echo(json.dumps(result.comparison.to_dict(), indent=1))
    _print_result(console, result, store)


@main.command()
@options(
    STUDY_FILE,
    method_option("empirical"),
    Option(
        "data",
        "--data",
        multiple=True,
        metavar="NAME|PATH",
        help="data of one task; given once per task [default: none]",
    ),
    *settings(leave_out=("data", "methods", "baseline")),
    AS_JSON,
)
def transfer(file: Path | None, data: tuple[str, ...], method: str, as_json: bool, **given: Any) -> None:
    """Allocate ranks on each task and on all together, train on each, and compare the losses.

    Each task is a study of its own with the same settings; repeat the command to continue.
    """
    config = read_study(file, given)
    for one in data:
        require_data(config, dataclasses.replace(config.data, data=one))
    require_reachable(config.tracking)
    from adaptive_lora.study.transfer import run_transfer

    console = make_console(as_json=as_json)
    table = run_transfer(config, data, method, console)
    if as_json:
        click.echo(json.dumps(table.to_dict(), indent=1))
    else:
        table.print(console)
