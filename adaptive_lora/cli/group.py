"""The main group: its commands stand in the files beside, one a kind of work."""

from __future__ import annotations

import sys
from typing import Any

import click

from adaptive_lora import __version__
from adaptive_lora.errors import AdaptiveLoraError
from adaptive_lora.interruption import Interrupted


class _Group(click.Group):
    """Turns errors that the user can mend into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AdaptiveLoraError as error:
            click.secho("Error: ", fg="red", err=True, nl=False)
            click.echo(str(error), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as stop:
            click.echo("\nInterrupted; the same command continues where it stopped.", err=True)
            sys.exit(stop.exit_code if isinstance(stop, Interrupted) else 130)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="adaptive-lora")
def main() -> None:
    """Where should LoRA's ranks go? Measure it on your model and data."""
