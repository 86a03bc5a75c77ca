"""The JSON Schema (2020-12) of a shape: a dataclass or `TypedDict`, whose texts below fields are their descriptions."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Any, NotRequired, Required

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def schema_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of values of a type.

    Args:
        kind: simple type, enumeration, dataclass, `TypedDict`, or a union, list, tuple or mapping of these.
        definitions: receives the schema of each class under its name.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (Required, NotRequired):
        return schema_of(arguments[0], definitions)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema_of(one, definitions) for one in arguments]}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1], definitions)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of(arguments[0], definitions)}
    if issubclass(kind, StrEnum):
        return {"enum": [str(one) for one in kind]}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # before its fields, which may lead back to it
        definitions[kind.__name__] |= object_schema(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def object_schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass or `TypedDict`.

    Fields with a default and those that are `NotRequired` may be left out.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    names = list(fields or hints)
    texts = _texts(kind)
    properties = {
        name: schema_of(hints[name], definitions) | ({"description": texts[name]} if name in texts else {})
        for name in names
    }
    optional = {name for name in names if typing.get_origin(hints[name]) is NotRequired}
    missing = dataclasses.MISSING
    optional |= {n for n, field in fields.items() if (field.default, field.default_factory) != (missing, missing)}
    required = [name for name in names if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


@cache
def _texts(kind: type) -> Mapping[str, str]:
    """Return field -> the text below it, where the source is at hand."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, ValueError):
        return {}
    body = getattr(tree, "body", [])
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
