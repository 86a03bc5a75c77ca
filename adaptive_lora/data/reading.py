"""Tables of rows as read, before they become examples: local files, image folders and hub data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.hub_sets import Classes, is_folder, read_hub, read_parquet
from adaptive_lora.data.row_files import FileRows, NoRow, read_csv, read_json, read_tsv
from adaptive_lora.data.rows import BadRow, LeftOut, drawn, left_out
from adaptive_lora.errors import DataError

_FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with their places, name and rows left out."""

    rows: Sequence[Mapping[str, Any]]
    """Column -> value of each row; images as {bytes, path}, not decoded; empty for invalid lines."""
    chosen: Sequence[int]
    """Indices of the rows to use, in order: the rows drawn, without `left_out`."""
    name: str
    """Name of the source: file name or hub id."""
    places: Sequence[str] = ()
    """Place of each row, such as `line 12`."""
    classes: Classes = field(default_factory=dict)
    home: Path = Path()
    """Folder that file names in the rows are relative to."""
    left_out: tuple[LeftOut, ...] = ()
    """Invalid lines among the rows drawn, where the user chose to skip them."""
    notes: tuple[str, ...] = ()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns of the rows, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, index: int) -> str:
        """Return the place of a row, for messages."""
        return f"{self.name} {self.places[index]}"


_ahead: dict[tuple[str | int | None, ...], Table] = {}
"""Tables read before heavy imports, kept until they are used."""


def read_ahead(config: DataConfig) -> Table:
    """Read the rows of a data configuration now; for files, the next `read_table` returns them.

    Raises:
        DataError: as `read_table`.
    """
    version = _version(config)
    table = read_table(config)
    if version is not None:
        _ahead[version] = table  # also where it had been read ahead before
    return table


def _version(config: DataConfig) -> tuple[str | int | None, ...] | None:
    """Return the identity of the file to read, with its present state and options; None for other sources."""
    path = Path(config.data).expanduser()
    if not _is_file(path):
        return None
    state = path.stat()
    file = (str(path.resolve()), state.st_mtime_ns, state.st_size)
    return *file, config.on_bad_row, config.max_examples, config.split_seed


def read_table(config: DataConfig) -> Table:
    """Return the rows of a data configuration.

    Raises:
        DataError: the file is missing, has no rows or cannot be read (with line numbers).
    """
    version = _version(config)
    if version in _ahead:
        return _ahead.pop(version)
    if config.data == "embedded":
        raise DataError("the embedded data are prompts and responses; this task needs data of its own: give --data.")
    path = Path(config.data).expanduser()
    if (path.suffix.lower() in _FORMATS or _is_file(path)) and not is_folder(path):
        (found, classes), name, home = read_file(path), path.name, path.parent
    else:
        (found, classes), name, home = read_hub(config), config.data, path
    if not found.rows:
        raise DataError(f"{name} has no examples; required at least a few.")
    taken = drawn(len(found.rows), config)
    bad = {i: row.problem for i in taken if isinstance(row := found.rows[i], NoRow)}
    refused = [BadRow(f"{name} {found.places[i]}", problem) for i, problem in bad.items()]
    lost = left_out(refused, config, name)
    chosen = [index for index in taken if index not in bad]
    if not chosen:
        raise DataError(f"{name}: every row is left out: {lost[0].reason}")
    return Table(
        rows=found.rows, chosen=chosen, name=name, places=found.places, classes=classes, home=home,
        left_out=lost, notes=tuple(found.notes),
    )  # fmt: skip


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # not a valid file name
        return False


def separate_test(config: DataConfig) -> DataConfig | None:
    """Return the configuration of a separate test source, all of which is used; None without one."""
    if config.test_data is None and config.test_split is None:
        return None
    return dataclasses.replace(
        config,
        data=config.test_data or config.data,
        data_subset=None if config.test_data else config.data_subset,
        data_split=config.test_split or config.data_split,
        test_data=None,
        test_split=None,
        max_examples=None,
    )


def read_file(path: Path) -> tuple[FileRows, Classes]:
    """Return the rows of a local file, and the classes of its columns where it names them.

    Raises:
        DataError: the file is missing, of another kind, empty, or cannot be read.
    """
    kind = path.suffix.lower()
    if not _is_file(path):
        raise DataError(f"data file {path} does not exist; check the path.")
    if kind not in _FORMATS or not path.is_file():
        raise DataError(f"data file {path}: required one of {', '.join(_FORMATS)}; got '{path.suffix}'.")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty; required at least a few examples.")
    if kind == ".parquet":
        return read_parquet(path)
    if kind in (".json", ".jsonl"):
        return read_json(path, lines=kind == ".jsonl"), {}
    return (read_csv(path) if kind == ".csv" else read_tsv(path)), {}
