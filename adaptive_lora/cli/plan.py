"""`plan` and `profile`: where ranks would go, before any training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from adaptive_lora.allocation import METRICS, MethodSpec
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
    settings_given,
    settings_of_methods,
)
from adaptive_lora.config import EARLIER_NAMES, study_from
from adaptive_lora.config.base_file import check_base
from adaptive_lora.config.text_files import Unreadable, read_text
from adaptive_lora.errors import ConfigError

_OWN = (
    "model", "revision", "trust_remote_code", "alpha", "scaling", "precision", "batch_size",
    "batching", "max_tokens", "gradient_checkpointing", "max_memory", "task",
)  # fmt: skip
"""Study settings that affect a plan."""


@main.command()
@options(
    *settings(only=_OWN),
    method_option("uniform", group="method"),
    Option("method", "--seed", default=0, show_default=True, help="seed of the trial, for methods that draw at random"),
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
        type=click.Choice(["peft"]),
        metavar="CHOICE",
        help="print PEFT's adapter_config.json instead of a table [peft] [default: table]",
    ),
)
def plan(method: str, seed: int, as_json: bool, emit: str | None, profile_file: Path | None, **given: Any) -> None:
    """Show the rank of every site and the number of parameters. Needs no weights."""
    own = (*_OWN, *EARLIER_NAMES)
    config = study_from(settings_given({key: given[key] for key in own}))
    name, written = MethodSpec.split(method)
    chosen = settings_given({key: value for key, value in given.items() if key not in own})
    for several in {"target_names", "roles", "layers", "towers"} & chosen.keys():
        chosen[several] = re.sub("[,+]", " ", str(chosen[several]))
    spec = MethodSpec.build(name, {**written, **chosen})
    check_base(config.model, [spec.base])
    from adaptive_lora.study.plan import peft_config, plan_method, print_plan

    report = plan_method(config, spec, profile=_read_profile(profile_file), seed=seed)
    if emit is not None:
        click.echo(peft_config(report))
        for caveat in report.peft_caveats:
            click.echo(f"note: {caveat}", err=True)
    elif as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        print_plan(report, make_console())


def _read_profile(path: Path | None) -> Any:
    if path is None:
        return None
    from adaptive_lora.methods.importance import ImportanceProfile

    try:
        return ImportanceProfile.from_json(read_text(path))
    except Unreadable as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error


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
    from adaptive_lora.study.steps import run_profile

    run_profile(config, metric, make_console(), as_json=as_json)
