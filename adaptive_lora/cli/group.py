"""The main command group, with error handling; its commands are in the other modules."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from adaptive_lora import __version__
from adaptive_lora.cli.documents import print_error, reserve_stdout
from adaptive_lora.config import TrackingConfig
from adaptive_lora.config.launched import first_on_machine, process_count, process_index, require_one_process
from adaptive_lora.errors import AdaptiveLoraError, ConfigError, naming_extras, require_extra
from adaptive_lora.interruption import Interrupted
from adaptive_lora.models.errors import write_traceback
from adaptive_lora.redaction import hide_credentials, printable

_MOVED = {
    "embedded": "the builder of the embedded base is a benchmark now: in a clone of the repository run "
    "`python -m benchmarks.embedded_base FOLDER`."
}
"""Command of earlier versions -> what to run instead."""
_TOGETHER = ("train", "study")
"""Commands that several processes, started by `accelerate launch`, run together."""


class _Command(click.Command):
    """A command with `--json`, which may need an extra of this package."""

    def __init__(self, *args: Any, extra: str | None = None, **attributes: Any) -> None:
        """Declare a command.

        Args:
            args: positional arguments of `click.Command`.
            extra: key of `EXTRAS` without which the command is refused before anything is loaded.
            attributes: attributes of `click.Command`.
        """
        super().__init__(*args, **attributes)
        self.params.append(
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document, and all else on stderr.")
        )
        self._extra = extra

    def invoke(self, ctx: click.Context) -> Any:
        if self.name not in _TOGETHER:
            require_one_process(ctx.command_path)
        if process_index() > 0:
            self._mute()
        if self._extra is not None:
            require_extra(self._extra, ctx.command_path)
        with naming_extras(ctx.command_path):
            return super().invoke(ctx)

    @staticmethod
    def _mute() -> None:
        """Leave to the first process what all of them would print; errors of this one are still shown."""
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


class _Group(click.Group):
    """Turns errors that the user can fix into one message and an exit code; JSON is alone on standard output."""

    command_class = _Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--json" in args and not {*args} & {*ctx.help_option_names}:  # before options are read, which may be wrong
            reserve_stdout(ctx)
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name; raises ConfigError for one that has moved."""
        if cmd_name in _MOVED:
            raise ConfigError(f"adaptive-lora {cmd_name}: {_MOVED[cmd_name]}")
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _crash
        try:
            return super().invoke(ctx)
        except click.ClickException as error:  # an option or command that there is not; click shows it
            print_error("UsageError", error.format_message(), error.exit_code)
            raise
        except AdaptiveLoraError as error:
            _say(str(error))
            print_error(type(error).__name__, str(error), error.exit_code)
            output = ctx.obj or TrackingConfig().output  # commands without it leave `obj` empty
            log = write_traceback(error, Path(output) / "errors")
            if log is not None:
                where = printable(hide_credentials(str(log)))
                click.echo(f"The library's traceback is in {where}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:  # wherever a name given as a path is first looked for
            if error.errno != errno.ENAMETOOLONG:
                raise
            text = (
                f"{printable(hide_credentials(str(error.filename)))} is too long for the name of a "
                "file or folder here; most file systems take 255 bytes between two slashes."
            )
            _say(text)
            print_error("ConfigError", text, AdaptiveLoraError.exit_code)
            sys.exit(AdaptiveLoraError.exit_code)
        except KeyboardInterrupt as stop:
            text = "Interrupted; the same command continues where it stopped."
            if process_index() == 0:
                click.echo(f"\n{text}", err=True)
            code = stop.exit_code if isinstance(stop, Interrupted) else 130
            print_error("Interrupted", text, code)
            sys.exit(code)


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a bug's traceback as Python does, with secrets in its messages hidden."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(printable(hide_credentials(text)))


def _say(text: str) -> None:
    """Print an error; words of hundreds of characters are cut."""
    if process_count() > 1:
        if "torch" not in sys.modules and not first_on_machine():
            return  # files and options are wrong in every process of this machine
        text = f"process {process_index()} of {process_count()}: {text}"
    click.secho("Error: ", fg="red", err=True, nl=False)
    click.echo(re.sub(r"(\S{300})\S{200,}", r"\1 ...", text), err=True)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
    epilog='Completion in bash: eval "$(_ADAPTIVE_LORA_COMPLETE=bash_source adaptive-lora)"',
)
@click.version_option(__version__, prog_name="adaptive-lora")
def main() -> None:
    """Where should LoRA's ranks go? Measure it on your model and data."""
