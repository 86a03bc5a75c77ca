"""`schema`: JSON Schemas (2020-12) of the study file, for editors, and of what commands print as JSON."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

import click

from adaptive_lora.allocation import METHODS, MethodSpec
from adaptive_lora.cli.documents import DIALECT, DOCUMENTS, document_schema, print_json
from adaptive_lora.cli.group import main
from adaptive_lora.config import MemorySize, option_fields
from adaptive_lora.config.parsing import RENAMED_SETTINGS
from adaptive_lora.options import SPELT, Limits

_WHOLE = r"[0-9]+(\.0*)?([eE]\+?[0-9]+)?"
_NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
_SIZE = r"\s*[0-9]+(\.[0-9]+)?\s*([kmgtKMGT]i?)?[bB]?\s*"


@main.command()
@click.argument("document", required=False, type=click.Choice(sorted(DOCUMENTS)), metavar="[DOCUMENT]")
def schema(document: str | None, as_json: bool) -> None:
    """Print the JSON Schema of the study file, or of what a command prints with --json.

    DOCUMENT is a command, or error for what any command prints when it fails.
    """
    print_json(study_file_schema() if document is None else document_schema(document))


def study_file_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study file, made from the settings' types, limits, defaults and help texts.

    Every value may be written as text, as the reader of study files takes it. What depends on several settings is
    checked by the reader alone.
    """
    properties = {name: _setting(name, field, kind) for name, (_, field, kind) in option_fields().items()}
    earlier = {
        name: {"description": f"earlier name of {now}", "deprecated": True} for name, now in RENAMED_SETTINGS.items()
    }
    return {
        "$schema": DIALECT,
        "title": "Study file of adaptive-lora",
        "description": "settings of `adaptive-lora study --config FILE`; each can be left out",
        "type": "object",
        "properties": properties | earlier,
        "additionalProperties": False,
    }


def _setting(name: str, field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    """Return the schema of one setting with its text and default."""
    unit = field.metadata["unit"]
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    values = _methods() if name == "methods" else _values(kind, field.metadata["limits"])
    if isinstance(default, list):
        values["anyOf"][0]["minItems"] = min(1, len(default))  # an empty list is none where that is the default
    return {"description": field.metadata["help"] + (f" [{unit}]" if unit else ""), "default": default, **values}


def _values(kind: Any, limits: Limits) -> dict[str, Any]:
    """Return the schema of values of a type within limits."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (one,) = (argument for argument in arguments if argument is not types.NoneType)
        return {"anyOf": [_values(one, limits), {"enum": [None, "none"]}]}
    if origin is tuple:
        item = _values(arguments[0], limits)
        form = f"({item['pattern'].removeprefix('^').removesuffix('$')})" if "pattern" in item else r"[^\s,;]+"
        several = {"type": "string", "pattern": rf"^\s*{form}([\s,;]+{form})*\s*$"}
        return {"anyOf": [{"type": "array", "items": item}, item, several]}
    if limits.choices:
        return {"enum": [*limits.choices, *_spelt(limits)]}
    if kind is bool:
        return {"enum": [True, False, *(word for words in SPELT for word in words)]}
    if kind is MemorySize:
        return {"type": ["integer", "string"], "pattern": f"^{_SIZE}$"}
    if kind in (int, float):
        form, noun = (_WHOLE, "integer") if kind is int else (_NUMBER, "number")
        bounds = {"minimum": limits.low, "exclusiveMinimum": limits.above, "maximum": limits.high}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        sign = r"\+?" if {limits.low, limits.above} != {None} else "[+-]?"  # every lower limit is 0 or more
        return {"type": [noun, "string"], "pattern": rf"^\s*{sign}{form}\s*$", **given}
    return {"type": ["string", "number"], **({"pattern": f"^(?:{limits.pattern})$"} if limits.pattern else {})}


def _spelt(limits: Limits) -> list[bool]:
    """Return the booleans that stand for a choice, such as false for `off`."""
    return [value for value, words in zip((True, False), SPELT, strict=True) if {*words} & {*limits.choices}]


def _methods() -> dict[str, Any]:
    """Return the schema of methods: their names, each with options of its own."""
    forms = [_method_form(name, kind) for name, kind in METHODS.usable()]
    several = "|".join(forms)
    item = {"anyOf": [{"enum": list(METHODS)}, {"type": "string", "pattern": rf"^\s*({several})\s*$"}]}
    text = {"type": "string", "pattern": rf"^\s*({several})([\s;]+({several}))*\s*$"}
    return {"anyOf": [{"type": "array", "items": item}, text]}


def _method_form(name: str, kind: type) -> str:
    """Return the regular expression of `NAME[:option=value,...]`; a method that wraps another takes any option."""
    names = sorted({field.name for owner in (MethodSpec, kind) for field in dataclasses.fields(owner)} - {"options"})
    options = r"\w[\w-]*" if "of" in names else "|".join(names).replace("_", "[_-]")
    pair = rf"({options})=[^,\s;]*"
    return rf"{re.escape(name)}(:{pair}(,{pair})*)?"
