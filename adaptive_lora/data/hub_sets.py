"""Parquet files, hub sets and local folders laid out like one, by `datasets`.

It finds and downloads their files and reads typed ones. JSON and CSV files among them, which have
no types, are read as local ones are: value by value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.row_files import FileRows, Written, read_csv, read_json, read_tsv
from adaptive_lora.errors import DataError, brief

Classes = Mapping[str, tuple[str, ...]]
"""Column of class indices -> names of the classes."""
_LISTED = ("metadata.csv", "metadata.jsonl")
"""Names of the table of a folder of images."""


def read_parquet(path: Path) -> tuple[FileRows, Classes]:
    """Read a Parquet file with the features that its writer declared.

    Raises:
        DataError: it is none, or holds no rows.
    """
    import datasets
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            count = file.metadata.num_rows
    except (ArrowException, OSError) as error:
        raise DataError(f"data file {path}: cannot be read as parquet: {error}") from error
    if not count:
        raise DataError(f"data file {path}: holds no examples; required at least a few.")
    datasets.disable_progress_bars()
    try:
        return _typed(datasets.load_dataset("parquet", data_files=str(path), split="train"))
    except Exception as error:  # datasets wraps every reader's own error type
        cause = error.__cause__ or error
        raise DataError(f"data file {path} cannot be read as parquet: {brief(cause)}") from error


def read_hub(config: DataConfig) -> tuple[FileRows, Classes]:
    """Read a hub data set, or a local folder laid out like one.

    Raises:
        DataError: there is none, or no such split or subset.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        name = str(Path(config.data).expanduser()) if Path(config.data).is_dir() else config.data
        builder = datasets.load_dataset_builder(
            name, config.data_subset, revision=config.data_revision
        )
        if (untyped := _untyped(builder, config)) is not None:
            return untyped, {}
        return _typed(
            datasets.load_dataset(
                name, config.data_subset, split=config.data_split, revision=config.data_revision
            )
        )
    except DataError:
        raise
    except Exception as error:  # datasets and the hub raise a dozen unrelated types
        raise DataError(
            f"data '{config.data:.200}' is neither a local file nor reachable on the hub "
            f"({type(error).__name__}: {brief(error)}); give a file "
            "(.json, .jsonl, .csv, .tsv, .parquet), a hub data set id, or 'embedded'."
        ) from error


def _untyped(builder: Any, config: DataConfig) -> FileRows | None:
    """Return the rows of a set of JSON or CSV files; None where its files or card have types."""
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import (
        FolderBasedBuilderConfig,
    )
    from datasets.packaged_modules.json.json import JsonConfig

    form = builder.config
    if builder.info.features is not None or not form.data_files:
        return None
    if isinstance(form, JsonConfig):
        _require_usual(form, JsonConfig(), config.data)
        return _split(builder, config.data_split, lambda path: read_json(path, lines=False))
    if isinstance(form, CsvConfig):
        _require_usual(form, CsvConfig(sep="\t" if form.sep == "\t" else ","), config.data)
        return _split(builder, config.data_split, read_tsv if form.sep == "\t" else read_csv)
    if isinstance(form, FolderBasedBuilderConfig) and Path(config.data).is_dir():
        return _listed_images(form.data_files, config.data_split)
    return None


def _require_usual(form: Any, usual: Any, data: str) -> None:
    """Refuse a set whose card changes how its files are read."""
    own = ("name", "version", "data_dir", "data_files", "description", "delimiter")
    names = [field.name for field in dataclasses.fields(usual) if field.name not in own]
    changed = [name for name in names if getattr(form, name) != getattr(usual, name)]
    if changed:
        raise DataError(
            f"data '{data:.200}': its card sets {', '.join(changed)} for its files, which is not "
            "read here; save the set as a JSON, CSV or Parquet file."
        )


def _split(builder: Any, spec: str, read: Any) -> FileRows:
    """Read the files of a split, or of parts such as `train[:10%]+validation`."""
    import datasets

    files = {str(name): paths for name, paths in builder.config.data_files.items()}
    named = [name for name in files if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", spec)]
    manager = datasets.DownloadManager()
    found: dict[str, FileRows] = {}
    for name in named:
        origins = [str(file) for file in files[name]]
        places = [[*manager.iter_files(p)] for p in manager.download_and_extract(origins)]
        parts = [
            (Path(origin).name, read(Path(path)))
            for origin, paths in zip(origins, places, strict=True)
            for path in paths
        ]
        found[name] = _joined(parts)
    lengths = {name: len(found[name].rows) if name in found else 0 for name in files}
    # Raises ValueError with the splits that there are, where a name is none of them.
    wanted = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    whole = FileRows()
    for part in wanted:
        rows, span = found[part.splitname], slice(part.from_, part.to)
        whole.rows.extend(rows.rows[span])
        whole.places.extend(rows.places[span])
        whole.bad.extend(rows.bad)
        whole.notes.extend(rows.notes)
    return whole


def _joined(parts: Sequence[tuple[str, FileRows]]) -> FileRows:
    if len(parts) == 1:
        return parts[0][1]
    whole = FileRows()
    for name, part in parts:
        whole.rows.extend(part.rows)
        whole.places.extend(f"{name} {place}" for place in part.places)
        whole.bad.extend((f"{name} {place}", problem) for place, problem in part.bad)
        whole.notes.extend(f"{name}: {note}" for note in part.notes)
    return whole


def _listed_images(files: Mapping[str, Sequence[Any]], split: str) -> FileRows | None:
    """Return the rows of the table beside a folder's images; None where there is none."""
    paths = [Path(str(file)) for name, each in files.items() if str(name) == split for file in each]
    tables = [path for path in paths if path.name in _LISTED]
    if not tables:
        return None
    found: list[tuple[str, FileRows]] = []
    for path in tables:
        part = read_csv(path) if path.suffix == ".csv" else read_json(path, lines=True)
        rows = [_with_image(row, path.parent) for row in part.rows]
        found.append((f"{path.parent.name}/{path.name}", dataclasses.replace(part, rows=rows)))
    whole = _joined(found)
    named = {row["image"]["path"] for row in whole.rows if "image" in row}
    others = {str(path) for path in paths if path not in tables} - named
    if others:
        whole.notes.append(f"{len(others):,} images that {tables[0].name} does not list")
    return whole


def _with_image(row: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return a row with its file's name as a picture."""
    name = row.get("file_name")
    if not isinstance(name, str):
        return row
    rest = {column: value for column, value in row.items() if column != "file_name"}
    return {"image": {"bytes": None, "path": str(folder / name)}, **rest}


def _typed(dataset: Any) -> tuple[FileRows, Classes]:
    """Return the rows of a data set with pictures as they are stored, and its class names."""
    import datasets

    classes = {}
    short, nested = [], []
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            classes[column] = tuple(feature.names)
        elif not isinstance(feature, datasets.Value):
            nested.append(column)
        elif feature.dtype in ("float16", "float32"):
            short.append((column, feature.dtype))
    rows = list(dataset)
    if short or nested:
        rows = [_as_written(row, short, nested) for row in rows]
    return FileRows(rows=rows, places=[f"row {index}" for index in range(len(rows))]), classes


def _as_written(
    row: dict[str, Any], short: Iterable[tuple[str, str]], nested: Iterable[str]
) -> dict[str, Any]:
    """Return a row with short floats as their type writes them, and objects as they were given.

    Python's float of a 32-bit 1.1 is 1.100000023841858; Arrow gives every object of a column the
    keys of all of them, with null in it.
    """
    import numpy as np

    changed = {column: _without_null_keys(row[column]) for column in nested}
    for column, kind in short:
        value = row[column]
        changed[column] = None if value is None else Written(str(np.dtype(kind).type(value)))
    return {**row, **changed}


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null_keys(v) for k, v in value.items() if v is not None}
    return [_without_null_keys(item) for item in value] if isinstance(value, list) else value
