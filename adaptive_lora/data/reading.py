"""Rows as they stand: local files, folders of images and hub sets, through `datasets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.damage import (
    csv_columns,
    csv_problem,
    delimiter_of,
    json_problem,
    parquet_problem,
)
from adaptive_lora.errors import DataError, brief

_PROBLEMS = {"json": json_problem, "csv": csv_problem, "parquet": parquet_problem}
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows with what is known of them."""

    rows: Sequence[Mapping[str, Any]]
    """Column -> value; pictures as {bytes, path}, not decoded."""
    name: str
    """File name or hub id."""
    unit: str
    """What a row is called in messages: `row`, or `item` of JSON."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column of class indices -> names of the classes."""
    home: Path = Path()
    """The folder that names of files in its rows are relative to."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns; none where there is no row."""
        return tuple(self.rows[0]) if self.rows else ()

    def where(self, index: int) -> str:
        """Return where a row stands, for messages."""
        return f"{self.name} {self.unit} {index}"


def read_table(config: DataConfig) -> Table:
    """Return the rows of a data configuration.

    Raises:
        DataError: unreadable file (with line), not found, no rows.
    """
    if config.data == "embedded":
        raise DataError(
            "the embedded data are prompts and responses; this task needs data of its own: give "
            "--data."
        )
    path = Path(config.data).expanduser()
    kind = _FORMATS.get(path.suffix.lower())
    if kind is not None or _is_file(path):
        rows, classes = _read_file(path, kind)
        name, unit, home = path.name, "row" if kind != "json" else "item", path.parent
    else:
        (rows, classes), name, unit, home = _read_hub(config), config.data, "row", path
    if not rows:
        raise DataError(f"{name} has no examples; required at least a few.")
    return Table(rows=rows, name=name, unit=unit, classes=classes, home=home)


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # no name that a file can have
        return False


def read_test_table(config: DataConfig) -> Table | None:
    """Return the rows of a test part of its own, or None where there is none."""
    if config.test_data is None and config.test_split is None:
        return None
    return read_table(
        dataclasses.replace(
            config,
            data=config.test_data or config.data,
            data_subset=None if config.test_data else config.data_subset,
            data_split=config.test_split or config.data_split,
        )
    )


_Rows = tuple[Sequence[Mapping[str, Any]], Mapping[str, tuple[str, ...]]]


def _listed(dataset: Any) -> _Rows:
    """Return the rows of a data set with pictures as they are stored, and its class names."""
    import datasets

    classes = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            classes[column] = tuple(feature.names)
    return list(dataset), classes


def _read_file(path: Path, kind: str | None) -> _Rows:
    import datasets

    if not _is_file(path):
        raise DataError(f"data file {path} does not exist; check the path.")
    if kind is None or not path.is_file():
        raise DataError(
            f"data file {path}: required one of {', '.join(_FORMATS)}; got '{path.suffix}'."
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty; required at least a few examples.")
    problem = _PROBLEMS[kind](path)
    if problem:
        raise DataError(f"data file {path}: {problem}")
    options: dict[str, Any] = {}
    if kind == "csv":  # all is text: neither "NA" nor "007" nor "1.50" is to become another
        names = dict.fromkeys(csv_columns(path), datasets.Value("string"))
        options = {"sep": delimiter_of(path), "keep_default_na": False}
        options["features"] = datasets.Features(names)
    datasets.disable_progress_bars()
    try:
        return _listed(datasets.load_dataset(kind, data_files=str(path), split="train", **options))
    except Exception as error:  # datasets wraps every reader's own error type
        cause = error.__cause__ or error
        raise DataError(f"data file {path} cannot be read as {kind}: {brief(cause)}") from error


def _read_hub(config: DataConfig) -> _Rows:
    """Read a hub data set, or a local folder laid out like one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return _listed(
            datasets.load_dataset(
                str(Path(config.data).expanduser()) if Path(config.data).is_dir() else config.data,
                config.data_subset,
                split=config.data_split,
                revision=config.data_revision,
            )
        )
    except Exception as error:  # datasets and the hub raise a dozen unrelated types
        raise DataError(
            f"data '{config.data:.200}' is neither a local file nor reachable on the hub "
            f"({type(error).__name__}: {brief(error)}); give a file "
            f"({', '.join(_FORMATS)}), a hub data set id, or 'embedded'."
        ) from error
