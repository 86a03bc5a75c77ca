"""`power`: number of seeds and examples that a study needs."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import AS_JSON, Option, make_console, options, settings, settings_given
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError


class _Finite(click.FloatRange):
    """A finite number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


_ABOVE = _Finite(min=0, min_open=True)
_SHARE = _Finite(min=0, max=1, min_open=True, max_open=True)
_SETTINGS = ("tracking_uri", "experiment", "baseline", "correction")


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
    *settings(only=_SETTINGS),
    AS_JSON,
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
    config = study_from(settings_given({name: given[name] for name in _SETTINGS if name != "baseline"}))
    if study_id is not None:
        require_reachable(config.tracking, must_exist=True)
    elif given["difference"] is None:
        raise ConfigError("power needs --difference with --spread; none was given.")
    elif given["example_spread"] is not None and given["examples"] is None:
        raise ConfigError("--example-spread needs --examples: those at which --spread holds.")
    from adaptive_lora.study.power import answer, assumed_question, observed_question, print_answer

    test = {"correction": config.correction, "alpha": given["alpha"], "power": given["power"]}
    question = assumed_question(given, test) if study_id is None else observed_question(config, given, test)
    found = answer(question)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_answer(found, make_console())
