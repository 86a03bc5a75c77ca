"""`embedded build`: the base that comes with the package, made anew."""

from __future__ import annotations

from pathlib import Path

import click

from adaptive_lora.cli.group import main
from adaptive_lora.errors import ConfigError


@main.group()
def embedded() -> None:
    """The base model that comes with the package."""


@embedded.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="seed of corpus, weights and order")
@click.option("--steps", type=int, help="optimiser steps [default: as shipped]")
def build(folder: Path, seed: int, steps: int | None) -> None:
    """Make the tokenizer and pretrain the base anew into FOLDER."""
    from adaptive_lora.embedded import build_base

    def show(step: int, loss: float) -> None:
        if step % 50 == 0:
            click.echo(f"step {step}  loss {loss:.4f}")

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder.")
    extra = {} if steps is None else {"steps": steps}
    build_base(folder, seed=seed, on_step=show, **extra)
    click.echo(f"written to {folder}")
