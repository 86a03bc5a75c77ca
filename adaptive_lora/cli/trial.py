"""`train` and `evaluate`: one trial, one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptive_lora.cli.early import require_data, require_inputs
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, method_option, read_study, study_file, study_options
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.errors import ConfigError


@main.command()
@study_file
@study_options(leave_out=("methods", "seeds", "baseline", "race"))
@method_option("uniform")
@click.option("--seed", default="0", show_default=True, metavar="INTEGER", help="seed of the trial")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False),
    help="folder to write the adapter to [default: tracking store only]",
)
def train(file: Path | None, method: str, seed: str, adapter: Path | None, **options: Any) -> None:
    """Train one trial: one method, seed and learning rate, as part of its study."""
    config = read_study(file, {**options, "methods": method, "seeds": seed})
    config.only_trial()
    require_inputs(config)
    from adaptive_lora.study.steps import run_train

    run_train(config, adapter, make_console())


@main.command()
@study_file
@study_options(leave_out=("methods", "seeds", "lr", "baseline", "model", "revision"))
@click.option(
    "--adapter", metavar="DIRECTORY|URI", help="adapter folder, models:/NAME@champion, or models:/NAME/VERSION"
)
@click.option("--fold", default=0, show_default=True, help="fold whose test split is scored")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def evaluate(file: Path | None, adapter: str | None, fold: int, as_json: bool, **options: Any) -> None:
    """Score a saved adapter on the test split, loaded as for serving."""
    config = read_study(file, options)
    if not adapter:
        raise ConfigError("evaluate needs --adapter: a folder or a models:/ URI; none was given.")
    require_data(config, config.data)
    require_reachable(config.tracking)
    from adaptive_lora.study.steps import run_evaluate

    run_evaluate(config, adapter, fold, make_console(), as_json=as_json)
