"""What commands share: an option for every setting, the study they make, and the console."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptive_lora.allocation import method_options
from adaptive_lora.config import EARLIER_NAMES, StudyConfig, load_study, option_fields, study_from

if TYPE_CHECKING:
    from rich.console import Console


def _help(field: dataclasses.Field[Any]) -> str:
    unit = f" [unit: {field.metadata['unit']}]" if field.metadata["unit"] else ""
    choices = field.metadata["limits"].choices
    listed = f" [{' | '.join(choices)}]" if choices else ""
    return f"{field.metadata['help']}{listed}{unit} [default: {_shown(field.default)}]"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def study_options(*, leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Add an option for every setting of a study; values not given are left to the dataclasses."""
    add_options = field_options(
        field for name, (_, field, _) in option_fields().items() if name not in leave_out and (not only or name in only)
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in EARLIER_NAMES:
            flag = f"--{name.replace('_', '-')}"
            function = click.option(flag, name, hidden=True)(function)
        decorated: Callable[..., Any] = add_options(function)
        return decorated

    return decorate


def field_options(fields: Iterable[dataclasses.Field[Any]]) -> Callable[..., Any]:
    """Add an option for each of these fields, which `options.option` made."""
    listed = tuple(fields)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(listed):
            flag = f"--{field.name.replace('_', '-')}"
            alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.metadata["switch"] else {}
            function = click.option(flag, field.name, metavar="VALUE", help=_help(field), **alone)(function)
        return function

    return decorate


def options_of_methods(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every option that a method of the catalogue has and a study has not."""
    settings = option_fields()
    for name, (field, methods) in reversed(method_options().items()):
        if name in settings:
            continue  # alpha and scaling mean the same where there is one method
        whose = f"{', '.join(methods)}: " if methods else ""
        default = "the method's own" if len(methods) > 1 else _shown(field.default)
        flag = f"--{name.replace('_', '-')}"
        text = f"{whose}{field.metadata['help']} [default: {default}]"
        function = click.option(flag, name, metavar="VALUE", help=text)(function)
    return function


def settings_given(options: Mapping[str, Any]) -> dict[str, object]:
    """Return the options that were given; the others are left to the dataclasses."""
    return {name: value for name, value in options.items() if value is not None}


def read_study(file: Path | None, options: Mapping[str, Any]) -> StudyConfig:
    """Return the study of a file, or of the defaults, with the options that were given over it."""
    given = settings_given(options)
    config = study_from(given) if file is None else load_study(file, given)
    click.get_current_context().find_root().obj = config.tracking.output
    return config


def make_console() -> Console:
    """Return the console of this process; wide where no terminal says otherwise."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


study_file = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="study file (YAML); options on the command line go over it [default: none]",
)
