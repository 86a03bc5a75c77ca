"""`plan` and `profile`: where ranks would go, before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.allocation import METRICS, Plan, RankPlan, TunerPlan
from adaptive_lora.allocation.architecture import size
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.cli.early import require_inputs
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
    settings_of_methods,
)
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.redaction import shown
from adaptive_lora.runner.emit import FORMS
from adaptive_lora.runner.own_model import PLAN_SETTINGS
from adaptive_lora.runner.own_model import plan as plan_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from adaptive_lora.runner.plan import PlanReport


@main.command()
@options(
    *settings(only=PLAN_SETTINGS),
    method_option("uniform", group="method"),
    Option(
        "method",
        "--seed",
        default=0,
        show_default=True,
        help="seed of the trial, for methods that draw at random, and of A with --adapter",
    ),
    Option(
        "method",
        "--profile",
        "profile_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="importance profile (JSON of `profile`), for data-driven methods [default: none]",
    ),
    *settings_of_methods(),
    AS_JSON,
    Option(
        "output",
        "--emit",
        type=click.Choice(FORMS),
        metavar="CHOICE",
        help="print the plan in the form of a fine-tuning tool instead of a table; peft: adapter_config.json "
        f"[{' | '.join(FORMS)}] [default: table]",
    ),
    Option(
        "output",
        "--adapter",
        type=click.Path(path_type=Path),
        help="new folder for an untrained adapter of the plan, from which axolotl and llamafactory start "
        "[default: none]",
    ),
)
def plan(
    method: str,
    seed: int,
    as_json: bool,
    emit: str | None,
    adapter: Path | None,
    profile_file: Path | None,
    **given: Any,
) -> None:
    """Show the rank of every site and the number of parameters. Needs no weights."""
    if adapter is not None and emit is None:
        raise ConfigError("--adapter is for --emit axolotl or llamafactory; give one of them, or leave it out.")
    model = ModelConfig().model if given["model"] is None else given["model"]
    report = plan_of(**{**given, "model": model}, method=method, profile=profile_file, seed=seed)
    if emit is not None:
        emitted = report.emit(emit, adapter=adapter, seed=seed)
        click.echo(emitted.text)
        for caveat in emitted.caveats:
            click.echo(f"note: {caveat}", err=True)
    elif as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        _print_plan(report, make_console())


def _print_plan(report: PlanReport, console: Console) -> None:
    """Print the table of sites, or of tensors, and the totals."""
    from adaptive_lora.training.memory import describe

    plan = report.plan

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    console.print(_tensor_table(plan) if isinstance(plan, TunerPlan) else _site_table(plan, report.sites))
    if report.note is not None:
        say(f"\n[yellow]note[/]       {shown(report.note)}")
    say(
        f"\ntrainable  {plan.trainable_parameters:,} of {report.total_parameters:,} parameters: "
        f"{report.reduction_vs_full:.2%} fewer than full fine-tuning\n"
        f"as much as uniform rank {report.uniform_rank:.2f} on all {len(report.sites)} sites"
    )
    say(f"memory     {describe(report.memory, report.load)}")
    if plan.budget is not None:
        say(f"budget     {plan.budget:,}, of which {plan.budget - plan.trainable_parameters:,} unused")
    if isinstance(plan, TunerPlan):
        return
    say(f"scaling    {plan.scaling}: factor {plan.scaling.formula}")
    if plan.scaling_in_training:
        say(f"           {plan.scaling_in_training}")
    if plan.left_out:
        say(f"left out   {', '.join(plan.left_out)} (rank 0)")
    for line in () if plan.certificate is None else plan.certificate.sentences():
        say(line)


def _tensor_table(plan: TunerPlan) -> Table:
    """Return the table of trained tensors; tensors of one name in all blocks share a row."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, shape in plan.tensors.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        rows.setdefault((pattern, " x ".join(map(str, shape))), []).append(size(shape))
    table = _table(plan, "trained", "shape", "number", "parameters")
    for (pattern, sides), sizes in rows.items():
        table.add_row(pattern, sides, f"{len(sizes):,}", f"{sum(sizes):,}")
    return table


def _site_table(plan: RankPlan, sites: Sequence[AdapterSite]) -> Table:
    """Return the table of sites, with the tower where the base has several and rates where they differ."""
    towers, rates = any(site.tower for site in sites), bool(plan.lr_multipliers())
    headings = ("site", "layer", "role", "in", "out", "rank", "alpha", "factor")
    table = _table(plan, *headings, *(["rate"] if rates else []), "parameters")
    for entry in plan.entries:
        site = entry.site
        table.add_row(
            shown(site.name),
            f"{site.tower} {site.layer}" if towers else str(site.layer),
            str(site.role),
            f"{site.in_features:,}",
            f"{site.out_features:,}",
            str(entry.rank),
            f"{entry.alpha:g}",
            f"{plan.scale_of(entry):g}",
            *([f"x{entry.lr_multiplier:.3g}"] if rates else []),
            f"{entry.parameters:,}",
        )
    return table


def _table(plan: Plan, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=shown(plan.method), header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("trained", "site", "role") else "right")
    return table


@main.command()
@options(
    STUDY_FILE,
    *settings(leave_out=("methods", "lr", "baseline")),
    Option(
        "profile",
        "--metric",
        type=click.Choice(tuple(METRICS)),
        metavar="CHOICE",
        default="weight_gradient",
        show_default=True,
        help="importance metric: " + "; ".join(f"{name} ({text})" for name, text in METRICS.items()),
    ),
    AS_JSON,
)
def profile(file: Path | None, metric: str, as_json: bool, **given: Any) -> None:
    """Measure the importance of every site on training examples; feed it to `plan --profile`."""
    config = read_study(file, given)
    require_inputs(config, trained=False)
    from adaptive_lora.runner.steps import run_profile

    run_profile(config, metric, make_console(), as_json=as_json)
