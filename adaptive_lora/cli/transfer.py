"""`transfer`: measures whether ranks allocated on one task suit another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.early import require_data
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, method_option, read_study, study_file, study_options
from adaptive_lora.config.store_place import require_reachable


@main.command()
@study_file
@study_options(leave_out=("data", "methods", "baseline"))
@click.option(
    "--data", multiple=True, metavar="NAME|PATH", help="data of one task; to be given once per task [default: none]"
)
@method_option("empirical")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def transfer(file: Path | None, data: tuple[str, ...], method: str, as_json: bool, **options: Any) -> None:
    """Allocate ranks on each task and on all together, train on each, and compare the losses.

    Each task is a study of its own with the same settings; repeat the command to continue.
    """
    config = read_study(file, options)
    for one in data:
        require_data(config, dataclasses.replace(config.data, data=one))
    require_reachable(config.tracking)
    from rich.console import Console

    from adaptive_lora.study.transfer import print_table, run_transfer

    console = Console(stderr=True) if as_json else make_console()
    table = run_transfer(config, data, method, console)
    if as_json:
        click.echo(json.dumps(table.to_dict(), indent=1))
    else:
        print_table(table, console)
