"""JSON of the commands: with `--json`, standard output is one document that names its schema.

A schema is `adaptive-lora/NAME/VERSION`. Within a version keys are added, never removed, renamed or given another type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import click

VERSIONS = {
    "compare": 1,
    "doctor": 1,
    "error": 1,
    "evaluate": 1,
    "export": 1,
    "plan": 1,
    "planted": 1,
    "power": 1,
    "profile": 1,
    "study": 1,
    "sync": 1,
    "train": 1,
    "transfer": 1,
    "ui": 1,
    "upgrade-store": 1,
}
"""Document, named like its command -> version of its schema."""
_STDOUT = "adaptive_lora.stdout"


def reserve_stdout(ctx: click.Context) -> None:
    """Keep standard output for the document until the context ends; what else is printed goes to standard error."""
    ctx.meta[_STDOUT] = sys.stdout
    ctx.with_resource(redirect_stdout(sys.stderr))


def print_document(name: str, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print the document of a command; a list of objects names its schema in each.

    Args:
        name: key of `VERSIONS`.
        values: JSON-ready values; a ValueError refuses NaN and infinity, which JSON does not have.
    """
    schema = {"schema": schema_id(name)}
    document = {**schema, **values} if isinstance(values, Mapping) else [{**schema, **one} for one in values]
    stdout = click.get_current_context().meta.pop(_STDOUT)
    click.echo(json.dumps(document, indent=1, allow_nan=False), file=stdout)


def print_error(kind: str, message: str, exit_code: int) -> None:
    """Print an error as the document of a command that was to print one and has not.

    Args:
        kind: class of the error.
        message: text of the error, also on standard error.
        exit_code: exit code of the command.
    """
    if _STDOUT in click.get_current_context().meta:
        print_document("error", {"error": {"type": kind, "message": message, "exit_code": exit_code}})


def schema_id(name: str) -> str:
    """Return `adaptive-lora/NAME/VERSION` of a document."""
    return f"adaptive-lora/{name}/{VERSIONS[name]}"
