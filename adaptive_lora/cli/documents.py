"""JSON of the commands: with `--json`, standard output is one document that names its schema.

A schema is `adaptive-lora/NAME/VERSION`. Within a version keys are added, never removed, renamed or given another type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NamedTuple

import click


class Document(NamedTuple):
    """JSON document that a command prints with `--json`."""

    version: int
    """Version of its schema."""
    about: str
    shapes: tuple[str, ...]
    """Places of the classes whose fields are its keys, all together."""
    listed: bool = False
    """Mark of a list of objects, each of which names the schema."""


_COMPARED = ("analysis.comparison.Comparison", "cli.shapes.RecordShape")
DOCUMENTS = {
    "compare": Document(1, "the comparison, its report and champion", _COMPARED),
    "doctor": Document(1, "a list of findings, each with its `schema`", ("cli.shapes.FindingShape",), listed=True),
    "error": Document(1, "what any command prints when it fails", ("cli.shapes.ErrorShape",)),
    "evaluate": Document(1, "scores of an adapter, `test/NAME` each", ("cli.shapes.EvaluateShape",)),
    "export": Document(1, "the folder that was written", ("cli.shapes.ExportShape",)),
    "ladder": Document(1, "as `study`", (*_COMPARED, "cli.shapes.RunShape")),
    "plan": Document(1, "rank and alpha of every site, totals, memory", ("cli.shapes.PlanShape",)),
    "planted": Document(
        1, "one comparison per planted teacher, and the table of patterns and methods", ("cli.shapes.PlantedShape",)
    ),
    "power": Document(1, "numbers of seeds and examples that are needed", ("runner.power.Answer",)),
    "profile": Document(1, "importance of every site, as `plan --profile` reads it", ("cli.shapes.ProfileShape",)),
    "study": Document(1, "as `compare`, and the number of trials run", (*_COMPARED, "cli.shapes.RunShape")),
    "sync": Document(1, "what was delivered and what is left", ("cli.shapes.SyncShape",)),
    "train": Document(1, "the run of the trial and its metrics", ("cli.shapes.TrainShape",)),
    "transfer": Document(1, "the table of tasks", ("cli.shapes.TransferShape",)),
    "ui": Document(1, "address of the user interface", ("cli.shapes.UiShape",)),
    "upgrade-store": Document(1, "whether the store was upgraded, and its backup", ("cli.shapes.UpgradeShape",)),
}
"""Name of a document, which is that of its command -> the document."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_STDOUT = "adaptive_lora.stdout"


def reserve_stdout(ctx: click.Context) -> None:
    """Keep standard output for the document until the context ends; what else is printed goes to standard error."""
    ctx.meta[_STDOUT] = sys.stdout
    ctx.with_resource(redirect_stdout(sys.stderr))


def print_document(name: str, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print the document of a command, whose first key is its schema.

    Args:
        name: key of `DOCUMENTS`.
        values: JSON-ready values; a ValueError refuses NaN and infinity, which JSON does not have.
    """
    schema = {"schema": schema_id(name)}
    print_json({**schema, **values} if isinstance(values, Mapping) else [{**schema, **one} for one in values])


def print_json(values: Any) -> None:
    """Print JSON-ready values on the process's standard output, also where that is kept for a document."""
    stdout = click.get_current_context().meta.pop(_STDOUT, sys.stdout)
    click.echo(json.dumps(values, indent=1, allow_nan=False), file=stdout)


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
    return f"adaptive-lora/{name}/{DOCUMENTS[name].version}"


def document_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a document; keys that are not in it may be added within its version."""
    from adaptive_lora.cli.json_schema import object_schema  # not for `--help`

    document, definitions = DOCUMENTS[name], dict[str, Any]()
    whole: dict[str, Any] = {"properties": {"schema": {"const": schema_id(name)}}, "required": ["schema"]}
    for place in document.shapes:
        module, _, shape = place.rpartition(".")
        found = object_schema(getattr(import_module(f"adaptive_lora.{module}"), shape), definitions)
        whole["properties"] |= found["properties"]
        whole["required"] += found["required"]
    one = {"type": "object", **whole}
    return {
        "$schema": DIALECT,
        "title": schema_id(name),
        "description": document.about,
        **({"type": "array", "items": one} if document.listed else one),
        "$defs": definitions,
    }
