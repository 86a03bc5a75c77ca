"""`export`: writes an adapter in a format that every server reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, settings_given, study_options
from adaptive_lora.config import study_from
from adaptive_lora.errors import ConfigError


@main.command()
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--uniform", is_flag=True, help="one rank, scale 1: for servers with one alpha / r")
@click.option("--merged", is_flag=True, help="the base with the adapter in its weights")
@study_options(only=("tracking_uri", "trust_remote_code"))
def export(adapter: str, out: Path, uniform: bool, merged: bool, **options: Any) -> None:
    """Write ADAPTER (a folder or models:/ URI) to the new folder OUT, for serving elsewhere."""
    config = study_from(settings_given(options))
    if uniform == merged:
        raise ConfigError("export needs exactly one of --uniform and --merged.")
    from adaptive_lora.study.steps import run_export

    run_export(config, adapter, out, make_console(), merged=merged)
