"""Records of a journal, read strictly, because `sync` may be given a folder written by others.

Records are executed with the rights of the user who sends them: files are read, sent and deleted. So
a record can name only files of its own journal, and lines of any other form are corrupt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HELD = re.compile(r"files/[0-9a-f]{32}")
_DATASET = {"name", "digest", "source_type", "source", "profile"}


class CorruptJournal(ValueError):
    """A line of a journal cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of a journal."""

    op: str
    """Name of the operation in the store: a method of `uploader.Uploader`."""
    values: Mapping[str, Any]
    end: int
    """Position in the file after this line, in bytes."""


def read_record(line: bytes, end: int, place: Path) -> Record:
    """Read a line.

    Args:
        line: line of the file.
        end: position after it, in bytes.
        place: path of the file, for messages.

    Raises:
        CorruptJournal: it is not a line written by a recorder.
    """
    values = read_object(line, place)
    op = values.pop("op", None)
    if not isinstance(op, str) or op not in _FIELDS:
        raise CorruptJournal(f"{place} is corrupt: it asks for {op!s:.80}")
    wrong = [name for name, fits in _FIELDS[op].items() if name not in values or not fits(values[name])]
    if op == "run" and not _text(values.get("run_id")):
        wrong += [name for name, fits in _NEW_RUN.items() if not fits(values.get(name))]
    if wrong or not _text(values.get("store", "")):
        raise CorruptJournal(f"{place} is corrupt: {op} with {', '.join(wrong) or 'store'}")
    return Record(op=op, values=values, end=end)


def read_object(line: bytes, place: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        CorruptJournal: the line is not a JSON object.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptJournal(f"{place} is corrupt: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise CorruptJournal(f"{place} is corrupt: {type(values).__name__} where an object belongs")
    return values


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "run": {},
    "params": {"values": _texts},
    "tags": {"values": _texts},
    "metric": {"k": _text, "v": lambda v: isinstance(v, int | float), "s": _whole, "t": _whole},
    "data": {"dataset": lambda v: _texts(v) and v.keys() == _DATASET},
    "artifacts": {"held": lambda v: _text(v) and bool(_HELD.fullmatch(v)), "path": lambda v: v is None or _text(v)},
    "model": {"held": lambda v: _text(v) and bool(_HELD.fullmatch(v))},
    "status": {"status": _text, "time": _whole},
}
"""Operation -> types of its fields."""
_NEW_RUN: Mapping[str, Callable[[Any], bool]] = {
    "key": _text, "experiment_id": _text, "name": _text, "tags": _texts, "time": _whole,
}  # fmt: skip
"""Types of the fields of a run that the store does not have yet."""
