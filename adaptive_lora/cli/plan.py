"""`plan` and `profile`: where ranks would go, before any training."""

from __future__ import annotations

import atexit
import gc
import re
from pathlib import Path
from typing import Any

import click

from adaptive_lora.allocation import METRICS
from adaptive_lora.cli.completion import completed
from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import (
    RETENTION,
    STUDY_FILE,
    WORKERS,
    Option,
    make_console,
    method_option,
    options,
    read_study,
    settings,
    settings_of_methods,
)
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import ConfigError, require_extra, unknown_name
from adaptive_lora.models.collector import without_collector
from adaptive_lora.runner.early import require_inputs
from adaptive_lora.runner.emit import FORMS
from adaptive_lora.runner.own_model import PLAN_SETTINGS
from adaptive_lora.runner.own_model import plan as plan_of


class MetricNames(click.ParamType):  # type: ignore[type-arg]
    """Names of one or several metrics, with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names, each once, in the order given."""
        names = tuple(dict.fromkeys(re.findall(r"[^,\s]+", value))) if isinstance(value, str) else tuple(value)
        if unknown := next((name for name in names if name not in METRICS), None):
            self.fail(unknown_name("metric", unknown, METRICS), param, ctx)
        if not names:
            self.fail(f"required the name of a metric; known: {', '.join(METRICS)}.", param, ctx)
        return names

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the metavar."""
        return "NAMES"


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
    atexit.register(gc.freeze)  # collections during imports of torch and transformers, and at the exit: 2 of 5 seconds
    with without_collector():
        report = plan_of(**{**given, "model": model}, method=method, profile=profile_file, seed=seed)
    emitted = None if emit is None else report.emit(emit, adapter=adapter, seed=seed)
    if as_json:
        form = {} if emitted is None else {"emitted": {"form": emit, "text": emitted.text, "caveats": emitted.caveats}}
        print_document("plan", {**report.to_dict(), **form})
    elif emitted is not None:
        click.echo(emitted.text)
        for caveat in emitted.caveats:
            click.echo(f"note: {caveat}", err=True)
    else:
        from adaptive_lora.runner.plan_table import print_plan

        print_plan(report, make_console())


@main.command()
@options(
    STUDY_FILE,
    *settings(leave_out=("methods", "lr", "baseline", "wait", *WORKERS, *RETENTION)),
    Option(
        "profile",
        "--metric",
        "metrics",
        type=MetricNames(),
        shell_complete=completed("metric", tuple(METRICS), ""),
        default="weight_gradient",
        show_default=True,
        help="importance metric, or several with commas between them, of which those by gradients share one pass: "
        + "; ".join(f"{name} ({text})" for name, text in METRICS.items()),
    ),
    Option(
        "profile",
        "--experts",
        is_flag=True,
        help="also measure the routed experts of a mixture of experts, for methods with experts=true",
    ),
)
def profile(file: Path | None, metrics: tuple[str, ...], experts: bool, as_json: bool, **given: Any) -> None:
    """Measure the importance of every site on training examples; feed it to `plan --profile`."""
    config = read_study(file, given)
    require_inputs(config, trained=False)
    if config.tracking.tracking_uri is not None:
        require_extra("study", "--tracking-uri")
    from adaptive_lora.runner.measure import run_profiles

    first, *others = (one.to_dict() for one in run_profiles(config, metrics, make_console(), experts=experts))
    if as_json:
        print_document("profile", {**first, **({"others": others} if others else {})})
