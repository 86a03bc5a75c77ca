"""`planted`: the benchmark with a known answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import field_options, make_console, settings_given, study_options
from adaptive_lora.config import study_from
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.options import read_options
from adaptive_lora.study.planted.config import PlantedConfig

_TRACKING = ("tracking_uri", "experiment")


@main.command()
@field_options(dataclasses.fields(PlantedConfig))
@study_options(only=_TRACKING)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def planted(as_json: bool, **options: Any) -> None:
    """Plant a known low-rank change in a base and see which method finds where it is.

    Every method gets the budget of the planted change and the same training, over paired seeds,
    and is compared with uniform (0) and with the planted ranks themselves (the oracle, 1). Results
    are kept as they come: the same command continues, and several may share one output folder.
    """
    given = settings_given(options)
    tracking = study_from({key: given[key] for key in _TRACKING if key in given}).tracking
    config = read_options(PlantedConfig, {key: value for key, value in given.items() if key not in _TRACKING})
    require_reachable(tracking)
    from rich.console import Console

    from adaptive_lora.study.planted.benchmark import print_findings, run_planted

    console = Console(stderr=True) if as_json else make_console()
    found = run_planted(config, tracking, console)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_findings(found, console)
