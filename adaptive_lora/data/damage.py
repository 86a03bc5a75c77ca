"""What is wrong with a data file, found before `datasets` reads it and with the line."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

_NOTHING = "holds no examples; required at least a few."


def json_problem(path: Path) -> str | None:
    """Find what is wrong with a JSON or JSONL file, with its line; None where nothing is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"required UTF-8 text; byte {error.start} is not."
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        items, problem = _loaded(text, 1)
        if problem is not None:
            return problem
        bad = next((i for i, item in enumerate(items) if not item or type(item) is not dict), None)
        if bad is not None:
            return f"item {bad}: required an object with columns."
        return None if items else _NOTHING
    rows = 0
    for number, line in enumerate(text.split("\n"), start=1):  # other line ends may stand in texts
        if line.strip():
            value, problem = _loaded(line, number)
            if problem is not None:
                return problem
            if not value or not isinstance(value, dict):
                return f"line {number}: required one JSON object with columns a line."
            rows += 1
    return None if rows else _NOTHING


def _loaded(text: str, first_line: int) -> tuple[Any, str | None]:
    """Return the value of a JSON text, or what is wrong with it."""
    try:
        value = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_different_keys,
        )
        if "\\ud" in text.lower():  # `datasets` would put another sign in its place
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None, f"from line {first_line}: holds an unpaired surrogate."
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        return None, f"line {line}, column {error.colno}: not JSON ({error.msg})."
    except RecursionError:
        return None, f"line {first_line}: nested too deeply."
    except ValueError as error:
        return None, f"from line {first_line}: not JSON ({error})."
    return value, None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is beyond all floats")
    return number


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"column '{_repeated(name for name, _ in pairs)}' stands twice in a row")
    return values


def _repeated(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def csv_problem(path: Path) -> str | None:
    """Find the first row of a CSV or TSV file with more or fewer fields than the header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter_of(path))
            header = next(reader, None)
            if header is None:  # a byte order mark alone
                return _NOTHING
            if not all(name.strip() for name in header):
                return "line 1: a column has no name."
            if len(set(header)) < len(header):
                return f"line 1: column '{_repeated(header):.80}' stands twice."
            rows = 0
            for row in reader:
                rows += bool(row)
                if row and len(row) != len(header):
                    return f"line {reader.line_num}: required {len(header)} fields, got {len(row)}."
    except UnicodeDecodeError as error:
        return f"required UTF-8 text; byte {error.start} is not."
    except csv.Error as error:
        return f"line {reader.line_num}: {error}."
    return None if rows else _NOTHING


def parquet_problem(path: Path) -> str | None:
    """Find that a Parquet file is none or holds no rows."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return None if file.metadata.num_rows else _NOTHING
    except (ArrowException, OSError) as error:
        return f"cannot be read as parquet: {error}"


def csv_columns(path: Path) -> list[str]:
    """Return the header of a CSV or TSV file that has no problem."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=delimiter_of(path)))


def delimiter_of(path: Path) -> str:
    """Return what divides fields: tabs in .tsv, commas elsewhere."""
    return "\t" if path.suffix.lower() == ".tsv" else ","
