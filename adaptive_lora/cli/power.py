"""`power`: number of seeds and examples that a study needs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, cast

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, settings_given, study_options
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


@main.command()
@study_options(only=("tracking_uri", "experiment", "baseline", "correction"))
@click.option("--difference", type=_ABOVE, metavar="NATS", help="true difference to detect, in nats per token")
@click.option(
    "--gain-percent",
    type=_ABOVE,
    metavar="PERCENT",
    help="true difference as a percentage of the gain over the frozen base",
)
@click.option("--spread", type=_ABOVE, metavar="NATS", help="standard deviation of paired differences over seeds")
@click.option("--example-spread", type=_ABOVE, metavar="NATS", help="standard deviation of one example within a seed")
@click.option(
    "--study-id", metavar="ID", help="finished study to take standard deviation and difference from, or 'latest'"
)
@click.option(
    "--comparisons", type=click.IntRange(min=1), metavar="INTEGER", help="number of methods compared with the baseline"
)
@click.option(
    "--examples", type=click.IntRange(min=2), metavar="INTEGER", help="number of test examples [default: observed]"
)
@click.option("--alpha", type=_SHARE, default=0.05, show_default=True, metavar="FLOAT", help="significance level")
@click.option("--power", type=_SHARE, default=0.8, show_default=True, metavar="FLOAT", help="power to reach")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
def power(as_json: bool, **options: Any) -> None:
    """Compute the number of seeds and examples needed to detect a difference, before any run.

    Give --difference and --spread, or --study-id to take them from a finished study.
    """
    question = _question(options)
    from adaptive_lora.study.power import answer, print_answer

    found = answer(question)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_answer(found, make_console())


def _question(options: dict[str, Any]) -> Any:
    study_id, spread = options["study_id"], options["spread"]
    if (study_id is None) == (spread is None):
        raise ConfigError(
            "power needs the noise: required either --spread or --study-id, got "
            + ("both." if spread is not None else "neither.")
        )
    own = ("tracking_uri", "experiment", "correction")
    config = study_from(settings_given({name: options[name] for name in own}))
    if study_id is not None:
        require_reachable(config.tracking, must_exist=True)
        return _from_study(options, config)
    if options["difference"] is None:
        raise ConfigError("power needs --difference with --spread; none was given.")
    from adaptive_lora.study.power import Question, assumed_noise

    examples, known = options["examples"], options["example_spread"] is not None
    if known and examples is None:
        raise ConfigError("--example-spread needs --examples: those at which --spread holds.")
    return Question(
        difference=options["difference"],
        components=assumed_noise(spread, seeds=0, examples=examples or 1, example_spread=options["example_spread"]),
        examples_known=known,
        comparisons=options["comparisons"] or 1,
        correction=cast(Any, config.correction),
        alpha=options["alpha"],
        power=options["power"],
        source="assumed",
    )


def _from_study(options: dict[str, Any], config: Any) -> Any:
    from adaptive_lora.study.comparison_input import Selection, read_comparison_input
    from adaptive_lora.study.power import Question, difference_of_interest, observed_noise
    from adaptive_lora.study.result import compare_input
    from adaptive_lora.tracking import connect

    ids = () if options["study_id"] == "latest" else (options["study_id"],)
    comparison_input = read_comparison_input(connect(config.tracking, must_exist=True), Selection(study_ids=ids))
    comparison = compare_input(comparison_input, config, options["baseline"])
    parts = observed_noise(comparison)
    if options["examples"] is not None:
        parts = dataclasses.replace(parts, examples=options["examples"])
    others = sum(method.difference is not None for method in comparison.methods)
    return Question(
        difference=difference_of_interest(comparison, options["difference"], options["gain_percent"]),
        components=parts,
        examples_known=True,
        comparisons=options["comparisons"] or others,
        correction=cast(Any, config.correction),
        alpha=options["alpha"],
        power=options["power"],
        source=f"observed in {comparison_input.name}, {parts.seeds} seeds",
    )
