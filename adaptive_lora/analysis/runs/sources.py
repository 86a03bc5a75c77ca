"""Runs made elsewhere as rows: of a file, a data frame, dictionaries, or runs of MLflow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.analysis.comparison.wording import named, plural
from adaptive_lora.analysis.runs.rows import ROLES, Rows
from adaptive_lora.data.reading import read_file
from adaptive_lora.data.row_files import NoRow
from adaptive_lora.errors import ConfigError, DataError


def file_rows(path: Path) -> Rows:
    """Return the rows of a CSV, TSV, JSON, JSON Lines or Parquet file.

    Raises:
        DataError: the file is missing or broken, or a line of it is no row.
    """
    found, _ = read_file(path)
    with path.open("rb") as file:
        header = file.readline()
    if path.suffix.lower() in (".csv", ".tsv") and b";" in header and not {*b",\t"} & {*header}:
        raise DataError(
            f"{path.name}: the columns are separated by semicolons; required commas (CSV) or tabs (a name with .tsv)."
        )
    for row, place in zip(found.rows, found.places, strict=True):
        if isinstance(row, NoRow):
            raise DataError(f"{path.name}, {place}: {row.problem}.")
    lines = (f"file: {path}, {plural(len(found.rows), 'row')}", *found.notes)
    return Rows(name=path.name, rows=found.rows, places=found.places, lines=lines)


def dictionaries(rows: Sequence[Any], name: str = "the list of runs") -> Rows:
    """Return dictionaries as rows.

    Raises:
        DataError: an item is no dictionary.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, item {number}: required a dictionary with columns, got {type(row).__name__}.")
    return Rows(name=name, rows=rows, places=[f"row {number}" for number in range(len(rows))])


def is_frame(value: Any) -> bool:
    """Tell whether a value is a pandas data frame, without importing pandas."""
    return hasattr(value, "to_dict") and hasattr(value, "columns")


def frame_rows(frame: Any) -> Rows:
    """Return a pandas data frame as rows; one of `mlflow.search_runs` is read as runs of MLflow."""
    rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
    places = [f"row {label}" for label in frame.index]
    if {"run_id", "status", "experiment_id"} <= set(map(str, frame.columns)):
        return Rows(name="MLflow runs", rows=rows, places=[f"run {row['run_id']}" for row in rows], list_unread=False)
    return Rows(name="the data frame", rows=rows, places=places)


def is_run(value: Any) -> bool:
    """Tell whether a value is a run of MLflow, without importing mlflow."""
    return all(hasattr(getattr(value, "data", None), name) for name in ("metrics", "params", "tags"))


def mlflow_rows(runs: Sequence[Any]) -> Rows:
    """Return runs of MLflow as rows with the columns of `mlflow.search_runs`: `metrics.x`, `params.x`, `tags.x`."""
    rows = [
        {
            "run_id": run.info.run_id,
            "status": run.info.status,
            **{
                f"{kind}.{name}": value
                for kind in ("metrics", "params", "tags")
                for name, value in getattr(run.data, kind).items()
            },
        }
        for run in runs
    ]
    return Rows(name="MLflow runs", rows=rows, places=[f"run {row['run_id']}" for row in rows], list_unread=False)


def usable_mlflow(table: Rows, columns: Mapping[str, str]) -> Rows:
    """Return the runs that finished and have what is read, with a line about the others.

    Raises:
        ConfigError: method, seed or score is not named.
        DataError: no run is left.
    """
    required = ("method", "score", *(() if "example" in columns else ("seed",)))
    if missing := [role for role in required if role not in columns]:
        raise ConfigError(
            f"MLflow runs: required --columns with {' and '.join(f'{role}=NAME' for role in missing)}, where NAME is "
            "tags.NAME, params.NAME or metrics.NAME, such as method=params.lora_r,seed=params.seed,score=metrics.f1."
        )
    kept: list[int] = []
    lost: Counter[str] = Counter()
    for at, row in enumerate(table.rows):
        absent = [name for role, name in columns.items() if role in ROLES and _is_absent(row.get(name))]
        if row["status"] != "FINISHED":
            lost[f"of status {row['status']}"] += 1
        elif absent:
            # a metric of a run that diverged is NaN, as one that it lacks is in a data frame
            metrics = " (missing or NaN)" if any(name.startswith("metrics.") for name in absent) else ""
            lost[f"without {' and '.join(absent)}{metrics}"] += 1
        else:
            kept.append(at)
    listed = "; ".join(f"{plural(number, 'run')} {reason}" for reason, number in lost.most_common())
    if not kept:
        names = sorted({name for row in table.rows for name in row if name.startswith(("metrics.", "params."))})
        raise DataError(
            f"no run of MLflow can be compared: {listed or 'no run was found'}. "
            f"The runs have {named(names, 12) or 'neither metrics nor parameters'}."
        )
    lines = [*table.lines, f"MLflow: {plural(len(table.rows), 'run')}, of which {len(kept)} are compared"]
    if lost:
        lines.append(f"left out: {listed}")
    return Rows(
        name=table.name,
        rows=[table.rows[at] for at in kept],
        places=[table.places[at] for at in kept],
        lines=tuple(lines),
        list_unread=False,
    )


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
