"""Options as dataclass fields: the only place of each default, help text, unit and limit.

The command line and the study file are generated from these fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from adaptive_lora.errors import ConfigError, nearest_name, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Allowed values of an option; None leaves that side open."""

    low: float | None = None
    high: float | None = None
    choices: Collection[str] = ()
    above: float | None = None
    """Exclusive lower bound."""
    pattern: str = ""
    """Regular expression that a text must match in full."""
    says: str = "letters, digits, '.', '_' or '-'"
    """Description of the pattern, for messages."""


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    limits: Limits | None = None,
    identity: bool = True,
    switch: bool = False,
    repeated: bool = False,
    label: str = "",
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: default value.
        help: one sentence for the user.
        unit: unit of the number, shown in the help text.
        limits: allowed values, checked when a study is read.
        identity: whether a change makes another experiment, so that it enters trial signatures.
        switch: whether the option without a value means true on the command line.
        repeated: whether an option of several texts is given once per text, which may hold spaces.
        label: form of a value in a method's label, where it is not the default, such as `from{:g}`.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "limits": limits or Limits(),
        "identity": identity,
        "switch": switch,
        "repeated": repeated,
        "label": label,
    }
    return dataclasses.field(default=default, metadata=metadata)


@cache
def type_hints(owner: type) -> Mapping[str, Any]:
    """Return the resolved annotations of an options class."""
    return typing.get_type_hints(owner)


def parse_value(annotation: Any, value: object) -> Any:
    """Convert text or a value to an option's type.

    Raises:
        ValueError: the value does not have the option's type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(arguments, value)
    if origin is tuple:
        if isinstance(value, Mapping):
            value = [f"{name}={one}" for name, one in value.items()]
        items = _split(value, commas=arguments[0] is not str) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        return tuple(parse_value(arguments[0], item) for item in items)
    if origin is typing.Literal:
        found = [one for one in arguments if str(one) == str(value)]
        if not found:
            raise ValueError(f"expected one of {', '.join(map(str, arguments))}, got {value!r:.80}")
        return found[0]
    if annotation is bool:
        return _parse_bool(value)
    if annotation in (int, float):
        return _parse_number(annotation, value)
    if annotation is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise ValueError(f"expected text, got {value!r:.80}")
    return annotation(value)


SPELT = (("on", "yes", "true"), ("off", "no", "false"))
"""Words for true, and words for false."""


def as_choice(value: object, limits: Limits) -> object:
    """Return the choice that a word for true or false means: `generate: No` is `off`."""
    if value in limits.choices or not isinstance(value, str | bool):
        return value
    words = next((words for words in SPELT if str(value).lower() in words), ())
    return next((word for word in words if word in limits.choices), value)


def _split(text: str, *, commas: bool) -> list[str]:
    """Split a list option: numbers at commas or spaces, texts (which hold commas) at spaces."""
    return text.replace("," if commas else ";", " ").split()


def _parse_union(arguments: tuple[Any, ...], value: object) -> Any:
    if type(None) in arguments and (value is None or value in ("", "none", "null")):
        return None
    problems = []
    for annotation in arguments:
        if annotation is not type(None):
            try:
                return parse_value(annotation, value)
            except ValueError as error:
                problems.append(str(error))
    raise ValueError("; or ".join(problems))


def _parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1"):
        return True
    if isinstance(value, str) and value.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"expected true or false, got {value!r:.80}")


def _parse_number(kind: type, value: object) -> int | float:
    noun = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {noun}, got {value!r:.80}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {noun}, got {value!r:.80}") from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(f"expected {noun}, got {value!r:.80}")
    return int(value) if kind is int and isinstance(value, int) else kind(number)


def out_of_limits(name: str, value: object, limits: Limits) -> str | None:
    """Return the problem with a parsed value, or None; tuples are checked item by item."""
    for item in value if isinstance(value, tuple) else (value,):
        if limits.choices and item is not None and str(item) not in limits.choices:
            near = nearest_name(item, limits.choices)
            hint = f"; did you mean '{near}'?" if near else ""
            return f"{name} must be one of {', '.join(limits.choices)}; got '{item!s:.80}'{hint}"
        if limits.pattern and isinstance(item, str) and not re.fullmatch(limits.pattern, item):
            return f"{name} must be {limits.says}; got '{item:.80}'"
        if isinstance(item, int | float) and not isinstance(item, bool):
            if limits.low is not None and item < limits.low:
                return f"{name} must be at least {limits.low:g}; got {item:g}"
            if limits.above is not None and item <= limits.above:
                return f"{name} must be above {limits.above:g}; got {item:g}"
            if limits.high is not None and item > limits.high:
                return f"{name} must be at most {limits.high:g}; got {item:g}"
    return None


def parse_options(
    values: Mapping[str, object], owners: Mapping[str, Any], *, what: str, place: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parsed values of options, also those out of limits, and option name -> problem.

    Args:
        values: option name -> text or parsed value.
        owners: option name -> options class that declares it.
        what: noun for an option in the message on an unknown name.
        place: prefix of every other problem.
    """
    parsed: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        if name not in owners:
            problems[name] = unknown_name(what, name, owners)
            continue
        (field,) = (field for field in dataclasses.fields(owners[name]) if field.name == name)
        value = as_choice(value, field.metadata["limits"])
        if field.metadata["repeated"] and isinstance(value, str):
            value = [value]
        try:
            parsed[name] = parse_value(type_hints(owners[name])[name], value)
        except (ValueError, TypeError) as error:
            problems[name] = f"{place}{name}: {error}"
            continue
        problem = out_of_limits(f"{place}{name}", parsed[name], field.metadata["limits"])
        if problem:
            problems[name] = problem
    return parsed, problems


def read_options(kind: type[T], values: Mapping[str, object]) -> T:
    """Make an options class from texts or parsed values, reporting all problems at once.

    Raises:
        ConfigError: every unknown name and wrong value, one per line.
    """
    owners = {field.name: kind for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    parsed, problems = parse_options(values, owners, what="setting")
    if problems:
        raise ConfigError("\n".join(problems.values()))
    return kind(**parsed)
