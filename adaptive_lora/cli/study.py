"""`study` and `compare`: run the grid of trials, and compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.cli.early import require_inputs
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, read_study, settings_given, study_file, study_options
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.redaction import shown

if TYPE_CHECKING:
    from rich.console import Console


@main.command()
@study_file
@study_options()
def study(file: Path | None, **options: Any) -> None:
    """Run a whole study: profile, train, evaluate, compare, register the winner.

    After an interruption, run the same command again to continue.
    """
    config = read_study(file, options)
    require_inputs(config)
    from adaptive_lora.study.run import run_study

    console = make_console()
    outcome = run_study(config, console)
    _print_result(console, outcome.study_result, outcome.store)


def _print_result(console: Console, study_result: Any, store: Any) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"\n[bold]report[/]    {shown(study_result.report.resolve())}")
    if study_result.champion is None:
        say(f"[bold]registry[/]  [red]nothing registered: {shown(study_result.no_champion)}[/]")
    else:
        champion = study_result.champion
        say(
            f"[bold]registry[/]  models:/{champion.name}@champion is version {champion.version} "
            f"({shown(study_result.comparison.winner)}); reloaded and equal"
        )
    say(f"[bold]tracking[/]  adaptive-lora ui --tracking-uri {shown(store.shown_uri)}")


@main.command()
@study_options(
    only=(
        "tracking_uri",
        "experiment",
        "output",
        "registered_model",
        "trust_remote_code",
        "baseline",
        "margin",
        "margin_percent",
        "correction",
    )
)
@click.option("--study-id", "study_ids", multiple=True, metavar="ID", help="ids of studies [default: the latest study]")
@click.option(
    "--query",
    metavar="FILTER",
    help="filter of trials in MLflow's syntax, such as \"tags.data = 'rows.json'\" [default: none]",
)
@click.option(
    "--allow-mixed",
    is_flag=False,
    flag_value="true",
    type=bool,
    default="false",
    help="compare across data sets, splits and bases, pairing only within each [default: false]",
)
@click.option("--json", "as_json", is_flag=True, help="print the comparison as JSON")
def compare(study_ids: tuple[str, ...], query: str | None, allow_mixed: bool, as_json: bool, **options: Any) -> None:
    """Compare finished trials, write the report, register the winner.

    Everything is read from the tracking store, also trials that others ran. Only the proof before
    a registration needs the base model and the data.
    """
    given = settings_given(options)
    tracking = study_from({**given, "baseline": None}).tracking
    require_reachable(tracking, must_exist=True)
    from rich.console import Console

    from adaptive_lora.study.comparison_input import Selection
    from adaptive_lora.study.run import compare_study

    console = Console(stderr=True) if as_json else make_console()
    selection = Selection(
        study_ids=tuple(" ".join(study_ids).replace(",", " ").split()), query=query, allow_mixed=allow_mixed
    )
    study_result, store = compare_study(tracking, selection, given, console)
    if as_json:
        click.echo(json.dumps(study_result.comparison.to_dict(), indent=1))
    _print_result(console, study_result, store)
