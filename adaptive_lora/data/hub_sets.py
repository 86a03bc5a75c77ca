"""Parquet files, hub data sets and local folders of the same layout, by `datasets`.

`datasets` finds and downloads the files and reads typed formats. JSON and CSV files among them are
read by `row_files`, value by value; of the types that a card declares, only class names are used.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.config import DataConfig
from adaptive_lora.data.row_files import FileRows, Written, read_csv, read_json, read_tsv
from adaptive_lora.errors import DataError, brief
from adaptive_lora.serving.base import hub_away

Classes = Mapping[str, tuple[str, ...]]
"""Column of class indices -> names of the classes."""
_LISTED = ("metadata.csv", "metadata.jsonl")
"""File names of the table in a folder of images or recordings."""
_MOST_FILES = 5
"""Maximum number of files named in a sentence."""


def read_parquet(path: Path) -> tuple[FileRows, Classes]:
    """Read a Parquet file with the features declared in it.

    Raises:
        DataError: it is not a Parquet file, or has no rows.
    """
    import datasets
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:  # `datasets` would read characters of the name as a pattern
            names = Counter(file.schema_arrow.names)
            repeated = next((name for name, count in names.items() if count > 1), None)
            table = None if repeated is not None else file.read()
        found = None if table is None else datasets.Dataset(datasets.table.InMemoryTable(table))
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"data file {path}: cannot be read as parquet: {brief(error)}") from error
    if found is None:
        raise DataError(f"data file {path}: column '{repeated:.80}' is given twice.")
    if not len(found):
        raise DataError(f"data file {path}: holds no examples; required at least a few.")
    return _typed(found)


def read_hub(config: DataConfig) -> tuple[FileRows, Classes]:
    """Read a hub data set, or a local folder of the same layout.

    Raises:
        DataError: the data set, split or subset does not exist.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(config.data).expanduser()
    folder = path if is_folder(path) else None
    if folder is not None:
        _require_plain_name(folder)
    cached, note = (None, None) if folder is not None else _cached(config)
    try:
        name, revision = str(folder or cached or config.data), None if cached else config.data_revision
        builder = datasets.load_dataset_builder(name, config.data_subset, revision=revision)
        found = _untyped(builder, config) or _typed(
            datasets.load_dataset(name, config.data_subset, split=config.data_split, revision=revision)
        )
    except DataError:
        raise
    except Exception as error:  # datasets and the hub raise a dozen unrelated types
        what = "cannot be read" if folder else "is neither a local file nor reachable on the hub"
        raise DataError(
            f"data '{config.data:.200}' {what} ({type(error).__name__}: {brief(error)}); give a "
            "file (.json, .jsonl, .csv, .tsv, .parquet), a hub data set id or a folder laid out "
            "like one, or 'embedded'."
        ) from error
    if folder is not None:
        found[0].notes.extend(_unread_files(builder, folder))
    if note is not None:
        found[0].notes.append(note)
    return found


def _cached(config: DataConfig) -> tuple[Path | None, str | None]:
    """Return the snapshot of a data set in the hub's cache and a sentence on it, where the hub cannot be asked.

    Raises:
        DataError: the snapshot lacks files of a series.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    away = hub_away(config.data, revision=config.data_revision, repo_type="dataset")
    if away is None:
        return None, None
    try:
        folder = Path(
            snapshot_download(config.data, repo_type="dataset", revision=config.data_revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None, None  # `datasets` has a cache of its own
    _require_plain_name(folder)
    series: dict[tuple[str, int], int] = Counter()
    for path in folder.rglob("*"):
        if part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\..+)", path.name):
            series[str(path.parent / part[1]) + part[3], int(part[2])] += 1
    for (name, whole), there in series.items():
        if there < whole:
            raise DataError(
                f"data '{config.data:.200}': {away}, and the hub's cache has {there} of the {whole} files "
                f"{Path(name).name}; required all, which a run with a connection downloads."
            )
    return folder, f"{away}: read from the hub's cache, commit {folder.name[:12]}"


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; a text that cannot be a path is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _require_plain_name(folder: Path) -> None:
    """Refuse a folder whose name `datasets` would read as a pattern matching other folders."""
    name = str(folder.resolve())
    if re.search(r"[*?\[]|::", name) or not name.isprintable():
        raise DataError(
            f"data folder {name}: its name has *, ?, [, :: or a control character, which are read "
            "as a pattern of other names; rename it, or give its file."
        )


def _unread_files(builder: Any, folder: Path) -> list[str]:
    """Return a sentence on files of a folder that belong to no split and would be ignored silently."""
    splits = (builder.config.data_files or {}).values()
    read = {Path(str(file)).resolve() for files in splits for file in files}
    others = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.resolve() not in read and not _is_about(path, folder)
    )
    listed = ", ".join(others[:_MOST_FILES]) + (" ..." if len(others) > _MOST_FILES else "")
    return [f"{len(others):,} files of the folder are not read: {listed}"] if others else []


def _is_about(path: Path, folder: Path) -> bool:
    """Return whether a file is documentation of a data set, or hidden."""
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return hidden or path.stem.upper() in ("README", "LICENSE", "DATASET_INFOS")


def _untyped(builder: Any, config: DataConfig) -> tuple[FileRows, Classes] | None:
    """Return the rows of a data set of JSON or CSV files with values as written, and class names.

    None where its files have typed formats, or its card declares images or recordings.
    """
    from datasets.features.features import require_decoding
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolderConfig
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilderConfig
    from datasets.packaged_modules.json.json import JsonConfig

    form, features = builder.config, builder.info.features or {}
    if not form.data_files or any(map(require_decoding, features.values())):
        return None
    classes = {name: names for name, f in features.items() if (names := _class_names(f))}
    if isinstance(form, JsonConfig):
        _require_usual(form, JsonConfig(), config.data)
        read: Any = functools.partial(read_json, lines=False)
    elif isinstance(form, CsvConfig):
        _require_usual(form, CsvConfig(sep="\t" if form.sep == "\t" else ","), config.data)
        read = read_tsv if form.sep == "\t" else read_csv
    elif isinstance(form, FolderBasedBuilderConfig) and is_folder(Path(config.data).expanduser()):
        column = "audio" if isinstance(form, AudioFolderConfig) else "image"
        listed = _listed_files(form.data_files, config.data_split, column)
        return None if listed is None else (listed, classes)
    else:
        return None
    return _split(builder, config.data_split, read), classes


def _require_usual(form: Any, usual: Any, data: str) -> None:
    """Refuse a data set whose card changes how its files are read."""
    own = ("name", "version", "data_dir", "data_files", "description", "delimiter")
    names = [field.name for field in dataclasses.fields(usual) if field.name not in own]
    changed = [name for name in names if getattr(form, name) != getattr(usual, name)]
    if changed:
        raise DataError(
            f"data '{data:.200}': its card sets {', '.join(changed)} for its files, which is not "
            "read here; save the set as a JSON, CSV or Parquet file."
        )


def _split(builder: Any, spec: str, read: Any) -> FileRows:
    """Read the files of a split, or of a slice such as `train[:10%]+validation`."""
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
    # Raises ValueError with the existing splits where the name is unknown.
    wanted = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    whole = FileRows()
    for part in wanted:
        rows, span = found[part.splitname], slice(part.from_, part.to)
        whole.rows.extend(rows.rows[span])
        whole.places.extend(rows.places[span])
        whole.notes.extend(rows.notes)
    return whole


def _joined(parts: Sequence[tuple[str, FileRows]]) -> FileRows:
    if len(parts) == 1:
        return parts[0][1]
    whole = FileRows()
    for name, part in parts:
        whole.rows.extend(part.rows)
        whole.places.extend(f"{name} {place}" for place in part.places)
        whole.notes.extend(f"{name}: {note}" for note in part.notes)
    return whole


def _listed_files(files: Mapping[str, Sequence[Any]], split: str, column: str) -> FileRows | None:
    """Return the rows of the table in a folder of images or recordings; None where there is no table."""
    paths = [Path(str(file)) for name, each in files.items() if str(name) == split for file in each]
    tables = [path for path in paths if path.name in _LISTED]
    if not tables:
        return None
    found: list[tuple[str, FileRows]] = []
    for path in tables:
        part = read_csv(path) if path.suffix == ".csv" else read_json(path, lines=True)
        rows = [_with_file(row, path.parent, column) for row in part.rows]
        found.append((f"{path.parent.name}/{path.name}", dataclasses.replace(part, rows=rows)))
    whole = _joined(found)
    named = {row[column]["path"] for row in whole.rows if column in row}
    others = {str(path) for path in paths if path not in tables} - named
    if others:
        whole.notes.append(f"{len(others):,} files that {tables[0].name} does not list")
    return whole


def _with_file(row: Mapping[str, Any], folder: Path, column: str) -> Mapping[str, Any]:
    """Return a row with the file that it names as its image or recording."""
    name = row.get("file_name")
    if not isinstance(name, str):
        return row
    rest = {column: value for column, value in row.items() if column != "file_name"}
    return {column: {"bytes": None, "path": str(folder / name)}, **rest}


def _typed(dataset: Any) -> tuple[FileRows, Classes]:
    """Return the rows of a data set with images and recordings not decoded, and its class names."""
    import datasets

    classes = {}
    short, nested = [], []
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
        elif names := _class_names(feature):
            classes[column] = names
        elif not isinstance(feature, datasets.Value):
            nested.append(column)
        elif feature.dtype in ("float16", "float32"):
            short.append((column, feature.dtype))
    rows = list(dataset)
    if short or nested:
        rows = [_as_written(row, short, nested) for row in rows]
    return FileRows(rows=rows, places=[f"row {index}" for index in range(len(rows))]), classes


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of classes that a column of classes, or of lists of them, declares; empty for others."""
    import datasets

    inner = getattr(feature, "feature", feature)  # of a list
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else ()


def _as_written(row: dict[str, Any], short: Iterable[tuple[str, str]], nested: Iterable[str]) -> dict[str, Any]:
    """Return a row with short floats printed at their own precision, and objects with their own keys.

    Python's float of a 32-bit 1.1 is 1.100000023841858; Arrow adds the keys of all objects of a
    column to each of them, with null values.
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
