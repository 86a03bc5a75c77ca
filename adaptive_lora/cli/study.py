"""`study`, `transfer` and `power`: grids of trials, and the size that they need."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import (
    RETENTION,
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
from adaptive_lora.config.storage import require_checkpoint_storage
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError, require_extra
from adaptive_lora.redaction import shown
from adaptive_lora.runner.early import require_data
from adaptive_lora.runner.study import ladder as climb
from adaptive_lora.runner.study import study as run

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_lora.runner.result import StudyResult


@main.command(extra="study")
@options(STUDY_FILE, *settings())
def study(file: Path | None, as_json: bool, **given: Any) -> None:
    """Run a whole study: profile, train, evaluate, compare, register the winner.

    After an interruption, run the same command again to continue.
    """
    console = make_console()
    result = run(read_study(file, given), console=console)
    print_result(console, result)
    if as_json:
        print_document("study", {**result.to_dict(), "trials_run": result.trials_run})


def print_result(console: Console, result: StudyResult) -> None:
    """Print where report, registered adapter and tracking store of a study are."""
    champion = result.champion
    if champion is None:
        registered = f"[red]nothing registered: {shown(result.no_champion)}[/]"
    else:
        registered = (
            f"models:/{champion.name}@champion is version {champion.version} "
            f"({shown(result.comparison.winner)}); reloaded and equal"
        )
    for line in (
        f"\n[bold]report[/]    {shown(result.report().resolve())}",
        f"[bold]registry[/]  {registered}",
        f"[bold]tracking[/]  adaptive-lora ui --tracking-uri {shown(result.tracking_uri)}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


@main.command(extra="study")
@options(
    STUDY_FILE,
    Option("study", "--rank", type=click.IntRange(min=1), required=True, help="rank of uniform at the budget"),
    *settings(leave_out=("methods", "baseline")),
)
def ladder(file: Path | None, rank: int, as_json: bool, **given: Any) -> None:
    """Measure what any allocation could win: uniform ranks at the budget, against many times its parameters.

    Without --ladder the rungs are half, 2, 4 and 16 times the rank. A study that has its own methods takes the same
    rungs by --ladder, and shares their trials.
    """
    console = make_console()
    config = read_study(file, given, methods=f"uniform:rank={rank}", baseline=None)
    result = climb(config, rank=rank, console=console)
    print_result(console, result)
    if as_json:
        print_document("ladder", {**result.to_dict(), "trials_run": result.trials_run})


@main.command(extra="study")
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
    *settings(leave_out=("data", "methods", "baseline", *RETENTION)),
)
def transfer(file: Path | None, data: tuple[str, ...], method: str, as_json: bool, **given: Any) -> None:
    """Allocate ranks on each task and on all together, train on each, and compare the losses.

    Each task is a study of its own with the same settings; repeat the command to continue.
    """
    config = read_study(file, given)
    for one in data:
        require_data(config, dataclasses.replace(config.data, data=one))
    require_checkpoint_storage(config.tracking)
    require_reachable(config.tracking)
    from adaptive_lora.runner.transfer import run_transfer

    console = make_console()
    table = run_transfer(config, data, method, console)
    if as_json:
        print_document("transfer", table.to_dict())
    else:
        table.print(console)


class _Finite(click.FloatRange):
    """A finite number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


_ABOVE = _Finite(min=0, min_open=True)
_SHARE = _Finite(min=0, max=1, min_open=True, max_open=True)
_OBSERVED = ("tracking_uri", "experiment", "baseline", "correction")
"""Study settings that affect the noise observed in a study."""


def _number(name: str, metavar: str, text: str, kind: click.FloatRange | click.IntRange = _ABOVE) -> Option:
    return Option("noise", name, type=kind, metavar=metavar, help=text)


@main.command()
@options(
    Option(
        "study",
        "--study-id",
        metavar="ID",
        help="finished study to take standard deviation and difference from, or 'latest'",
    ),
    _number("--difference", "NATS", "true difference to detect, in nats per token"),
    _number("--gain-percent", "PERCENT", "true difference as a percentage of the gain over the frozen base"),
    _number("--spread", "NATS", "standard deviation of paired differences over seeds"),
    _number("--example-spread", "NATS", "standard deviation of one example's difference within a seed"),
    _number("--examples", "INTEGER", "number of test examples [default: observed]", click.IntRange(min=2)),
    _number("--comparisons", "INTEGER", "number of methods compared with the baseline", click.IntRange(min=1)),
    Option(
        "study", "--alpha", type=_SHARE, default=0.05, show_default=True, metavar="FLOAT", help="significance level"
    ),
    Option("study", "--power", type=_SHARE, default=0.8, show_default=True, metavar="FLOAT", help="power to reach"),
    *settings(only=_OBSERVED),
)
def power(as_json: bool, **given: Any) -> None:
    """Compute the number of seeds and examples needed to detect a difference, before any run.

    Give --difference and --spread, or --study-id to take them from a finished study.
    """
    study_id, spread = given["study_id"], given["spread"]
    if (study_id is None) == (spread is None):
        raise ConfigError(
            "power needs the noise: required either --spread or --study-id, got "
            + ("both." if spread is not None else "neither.")
        )
    config = study_from(settings_given({name: given[name] for name in _OBSERVED if name != "baseline"}))
    if study_id is not None:
        require_extra("study", "--study-id")
        require_reachable(config.tracking, must_exist=True)
    elif given["difference"] is None:
        raise ConfigError("power needs --difference with --spread; none was given.")
    elif given["example_spread"] is not None and given["examples"] is None:
        raise ConfigError("--example-spread needs --examples: those at which --spread holds.")
    from adaptive_lora.runner.power import answer, assumed_question, observed_question, print_answer

    test = {"correction": config.correction, "alpha": given["alpha"], "power": given["power"]}
    question = assumed_question(given, test) if study_id is None else observed_question(config, given, test)
    found = answer(question)
    if as_json:
        print_document("power", found.to_dict())
    else:
        print_answer(found, make_console())
