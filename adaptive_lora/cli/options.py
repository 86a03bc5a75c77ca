"""Shared parts of the commands: options in groups, the study made of them, and the console."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click_option_group import OptionGroup

from adaptive_lora.allocation import METHODS, method_options
from adaptive_lora.cli.completion import completed
from adaptive_lora.config import EARLIER_NAMES, StudyConfig, WorkersConfig, load_study, option_fields, study_from

if TYPE_CHECKING:
    from rich.console import Console

_TITLES = {
    "model": "Model",
    "data": "Data",
    "study": "Study",
    "runs": "Runs made elsewhere",
    "method": "Method",
    "method's own": "Options of methods",
    "every method": "Options of every method",
    "train": "Training",
    "evaluation": "Evaluation",
    "profile": "Importance profile",
    "teacher": "Planted teachers",
    "noise": "Difference and standard deviation",
    "tracking": "Tracking",
    "where": "Where to run",
    "output": "Output",
    "hub": "Hugging Face hub",
}
"""Group of options -> its title in `--help`, in the order shown."""
WORKERS = tuple(field.name for field in dataclasses.fields(WorkersConfig))
"""Settings of the processes that run trials."""
_WHERE = (
    "engine", *WORKERS, "precision", "max_memory", "output", "checkpoints", "checkpoint_minutes", "checkpoint_steps",
)  # fmt: skip
"""Settings of other sections that are shown in the group `Where to run`."""
RETENTION = ("retain_data", "max_forgetting", "max_forgetting_percent")
"""Settings of what training makes a base forget."""
_PLACES = {
    "model": "NAME|PATH",
    "data": "NAME|PATH",
    "test_data": "FILE",
    "retain_data": "NAME|PATH",
    "template": "NAME|FILE",
    "output": "DIRECTORY",
    "checkpoints": "DIRECTORY|URL",
    "tracking_uri": "URI",
    "ray_address": "ADDRESS",
    "devices": "one|all|NUMBERS",
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


class Option:
    """An option of a command, in a group of `--help`."""

    def __init__(self, group: str, *names: str, **attributes: Any) -> None:
        """Declare an option.

        Args:
            group: key of its group in `_TITLES`.
            names: flags, and the name of the parameter where it differs.
            attributes: attributes of `click.option`.
        """
        self.group, self.names, self.attributes = group, names, attributes


def options(*declared: Option) -> Callable[..., Any]:
    """Add options to a command, in the order of their groups."""
    groups = {title: OptionGroup(title) for title in _TITLES.values()}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        order = sorted(declared, key=lambda option: list(_TITLES).index(option.group))
        for option in reversed(order):
            function = groups[_TITLES[option.group]].option(*option.names, **option.attributes)(function)
        return function

    return decorate


def settings(*, only: Iterable[str] | None = None, leave_out: Iterable[str] = ()) -> list[Option]:
    """Return an option for every setting of a study; values not given are left to the dataclasses."""
    shown = [
        field_option(_group_of(name), field)
        for name, (_, field, _) in option_fields().items()
        if name not in leave_out and (only is None or name in only)
    ]
    earlier = [Option("train", f"--{name.replace('_', '-')}", name, hidden=True) for name in EARLIER_NAMES]
    return shown + earlier


def own_settings(kind: type, group: str) -> list[Option]:
    """Return an option for every field of an options class; those named like a study's setting are in its group."""
    fields = dataclasses.fields(kind)
    return [field_option(_group_of(one.name) if one.name in option_fields() else group, one) for one in fields]


def _group_of(setting: str) -> str:
    section, _, _ = option_fields()[setting]
    return "where" if setting in _WHERE else section or "study"


def settings_of_methods() -> list[Option]:
    """Return the options of all methods that are not settings of a study."""
    found = []
    for name, (field, methods) in method_options().items():
        if name in option_fields():
            continue  # alpha and scaling mean the same where there is one method
        if methods:
            text = _own_help(name, methods)
            default = "the method's own" if len(methods) > 1 else None
            found.append(field_option("method's own", field, text=text, default=default))
        else:
            fields = ((method, dataclasses.fields(kind)) for method, kind in METHODS.usable())
            own = _own_help(name, [method for method, own in fields if name in (one.name for one in own)])
            text = field.metadata["help"]
            found.append(field_option("every method", field, text=f"{text}. {own}" if own else text))
    return found


def _own_help(name: str, methods: Iterable[str]) -> str:
    """Return the help texts of an option that these methods have of their own."""
    texts: dict[str, list[str]] = {}
    for method in methods:
        texts.setdefault(METHODS[method].__dataclass_fields__[name].metadata["help"], []).append(method)
    return ". ".join(f"{', '.join(whose)}: {help}" for help, whose in texts.items())


def field_option(
    group: str, field: dataclasses.Field[Any], *, text: str | None = None, default: str | None = None
) -> Option:
    """Return the option of a field.

    Args:
        group: key of its group.
        field: field made by `options.option`.
        text: help text; None: the field's.
        default: default as text; None: the field's.
    """
    unit, choices = field.metadata["unit"], field.metadata["limits"].choices
    text = text or field.metadata["help"]
    text += f" [{' | '.join(choices)}]" if choices else ""
    text += f" [unit: {unit}]" if unit and unit not in _UNITS else ""
    text += f" [default: {default or _shown(field.default)}]"
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if field.metadata["switch"] else {}
    alone |= {"multiple": True} if field.metadata["repeated"] else {}
    return Option(
        group,
        f"--{field.name.replace('_', '-')}",
        field.name,
        metavar=_metavar(field),
        help=text,
        shell_complete=completed(field.name, choices, _metavar(field)),
        **alone,
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata["limits"].choices:
        return "CHOICE"
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    by_type = next((metavar for start, metavar in _TYPES.items() if kind.startswith(start)), "TEXT")
    return _PLACES.get(field.name) or _UNITS.get(field.metadata["unit"]) or by_type


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in default) or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def method_option(default: str, group: str = "study") -> Option:
    """Return `--method`, whose names are completed in shells."""
    return Option(
        group,
        "--method",
        default=default,
        show_default=True,
        metavar="NAME[:OPTION=VALUE,...]",
        help="method, with options of its own",
        shell_complete=completed("method", METHODS, ""),
    )


STUDY_FILE = Option(
    "study",
    "--config",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="study file (YAML), overridden by options on the command line [default: none]",
)


def settings_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options given by the user; the others are left to the dataclasses."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def read_study(file: Path | None, options: Mapping[str, Any], **fixed: Any) -> StudyConfig:
    """Return the study of a file, or of the defaults, overridden by the options given and by what the command fixes."""
    given = {**settings_given(options), **fixed}
    config = study_from(given) if file is None else load_study(file, given)
    click.get_current_context().find_root().obj = config.tracking.output
    return config


def make_console() -> Console:
    """Return the console of this process, 140 columns wide unless it is a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
