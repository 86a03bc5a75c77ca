"""Shared parts of the commands: options of all settings in groups, the study made of them, and the console."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from click_option_group import OptionGroup

from adaptive_lora.allocation import METHODS, method_options
from adaptive_lora.config import EARLIER_NAMES, StudyConfig, load_study, option_fields, study_from

if TYPE_CHECKING:
    from rich.console import Console


_GROUPS = {
    "model": "Model",
    "data": "Data",
    None: "Study",
    "train": "Training",
    "evaluation": "Evaluation",
    "profile": "Importance profile",
    "tracking": "Tracking",
    "where": "Where to run",
}
"""Section of the settings -> title of its group in `--help`, in the order shown."""
_WHERE = ("engine", "precision", "max_memory", "output", "checkpoints", "checkpoint_minutes", "checkpoint_steps")
"""Settings of other sections that are shown in the group `Where to run`."""
_PLACES = {
    "model": "NAME|PATH",
    "data": "NAME|PATH",
    "test_data": "FILE",
    "template": "NAME|FILE",
    "output": "DIRECTORY",
    "checkpoints": "DIRECTORY",
    "tracking_uri": "URI",
    "of": "METHOD",
}
"""Option -> metavar, where the type does not give it."""
_TYPES = {
    "tuple[int": "INTEGERS",
    "tuple[float": "NUMBERS",
    "tuple[str": "NAMES",
    "MemorySize": "SIZE",
    "bool": "BOOLEAN",
    "int": "INTEGER",
    "float": "FLOAT",
}
"""Beginning of a type -> metavar; TEXT for others."""
_UNITS = {"tokens": "TOKENS", "steps": "STEPS", "minutes": "MINUTES", "%": "PERCENT"}
"""Unit -> metavar."""


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata["limits"].choices:
        return "CHOICE"
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    by_type = next((metavar for start, metavar in _TYPES.items() if kind.startswith(start)), "TEXT")
    return _PLACES.get(field.name) or _UNITS.get(field.metadata["unit"]) or by_type


def _completed(field: dataclasses.Field[Any]) -> Callable[..., Any] | None:
    """Return what completes an option's value in a shell: its choices, or paths; None for other values."""
    choices, metavar = field.metadata["limits"].choices, _metavar(field)

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
        if choices:
            return [choice for choice in choices if choice.startswith(incomplete)]
        return [CompletionItem(incomplete, type="dir" if metavar == "DIRECTORY" else "file")]

    return complete if choices or metavar.endswith(("PATH", "FILE", "DIRECTORY")) else None


def _add(
    group: OptionGroup, field: dataclasses.Field[Any], *, whose: str = "", default: str | None = None
) -> Callable[..., Any]:
    """Return a decorator that adds the option of a field to a group.

    Args:
        group: group of the option in `--help`.
        field: field made by `options.option`.
        whose: prefix of the help text, which names the methods that have the option.
        default: default as text; None: the field's.
    """
    unit, choices = field.metadata["unit"], field.metadata["limits"].choices
    text = f"{whose}{field.metadata['help']}"
    text += f" [{' | '.join(choices)}]" if choices else ""
    text += f" [unit: {unit}]" if unit and unit not in _UNITS else ""
    text += f" [default: {default or _shown(field.default)}]"
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.metadata["switch"] else {}
    decorator: Callable[..., Any] = group.option(
        f"--{field.name.replace('_', '-')}",
        field.name,
        metavar=_metavar(field),
        help=text,
        shell_complete=_completed(field),
        **alone,
    )
    return decorator


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in default) or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def study_options(*, leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Add an option for every setting of a study, in groups; values not given are left to the dataclasses."""
    groups: dict[str | None, list[dataclasses.Field[Any]]] = {section: [] for section in _GROUPS}
    for name, (section, field, _) in option_fields().items():
        if name not in leave_out and (not only or name in only):
            groups["where" if name in _WHERE else section].append(field)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in EARLIER_NAMES:
            flag = f"--{name.replace('_', '-')}"
            function = click.option(flag, name, hidden=True)(function)
        for section, fields in reversed(groups.items()):
            function = field_options(fields, _GROUPS[section])(function)
        return function

    return decorate


def field_options(fields: Iterable[dataclasses.Field[Any]], title: str = "Settings") -> Callable[..., Any]:
    """Add a group of options, one for each of these fields, which `options.option` made."""
    listed, group = tuple(fields), OptionGroup(title)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(listed):
            function = _add(group, field)(function)
        return function

    return decorate


def options_of_methods(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all methods that are not settings of a study, in two groups."""
    settings, shared, own = option_fields(), OptionGroup("Options of every method"), OptionGroup("Options of methods")
    for name, (field, methods) in reversed(method_options().items()):
        if name in settings:
            continue  # alpha and scaling mean the same where there is one method
        whose = f"{', '.join(methods)}: " if methods else ""
        default = "the method's own" if len(methods) > 1 else None
        function = _add(own if methods else shared, field, whose=whose, default=default)(function)
    return function


def method_option(default: str) -> Callable[..., Any]:
    """Add `--method`, whose names are completed in shells."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in METHODS if name.startswith(incomplete)]

    text = "method, with options of its own"
    metavar = "NAME[:OPTION=VALUE,...]"
    return click.option(
        "--method", default=default, show_default=True, metavar=metavar, help=text, shell_complete=complete
    )


def settings_given(options: Mapping[str, Any]) -> dict[str, object]:
    """Return the options given by the user; the others are left to the dataclasses."""
    return {name: value for name, value in options.items() if value is not None}


def read_study(file: Path | None, options: Mapping[str, Any]) -> StudyConfig:
    """Return the study of a file, or of the defaults, overridden by the options given."""
    given = settings_given(options)
    config = study_from(given) if file is None else load_study(file, given)
    click.get_current_context().find_root().obj = config.tracking.output
    return config


def make_console() -> Console:
    """Return the console of this process, 140 columns wide unless it is a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


study_file = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="study file (YAML), overridden by options on the command line [default: none]",
)
