"""Rows of JSON, JSON Lines, CSV and TSV files, each value as written in the file.

No library is used, because libraries guess types: pyarrow's JSON reader converts texts to dates and
integers to floats, and pandas' CSV reader joins lines between two quotes.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from adaptive_lora.errors import DataError

_NOTHING = "holds no examples; required at least a few."
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST_FIELD = 2**31 - 1
"""Maximum number of characters of a CSV field; documents exceed the csv module's 131,072."""


class NoRow(dict[str, Any]):
    """An invalid line or item: it has no columns, and gives the reason."""

    def __init__(self, problem: str) -> None:
        """Store the problem, a clause without a full stop."""
        super().__init__()
        self.problem = problem


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRows:
    """Rows of one file in order, including invalid lines."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)
    """Column -> value of each row; a `NoRow` for an invalid line."""
    places: list[str] = field(default_factory=list)
    """Place of each row in its file, such as `line 12`."""
    notes: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], place: str) -> None:
        """Append a row."""
        self.rows.append(row)
        self.places.append(place)


class Written(float):
    """A JSON number that is not an integer; its text is as written in the file, such as `1.50`."""

    text: str

    def __new__(cls, text: str) -> Written:
        """Parse the number and keep its text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        """Return the number as written in the file."""
        return self.text


def read_json(path: Path, *, lines: bool) -> FileRows:
    """Read a list of objects, or one object per line.

    Args:
        path: path of the file.
        lines: whether only one object per line is allowed.

    Raises:
        DataError: the file is not UTF-8, its list is not JSON, or it has no rows.
    """
    text = _text_of(path)
    listed = not lines and text.lstrip().startswith("[")
    found = _items(text, path) if listed else _lines(text)
    if not listed and any(isinstance(row, NoRow) for row in found.rows):
        _require_lines(text, path)
    return _some(found, path)


def _require_lines(text: str, path: Path) -> None:
    """Refuse one JSON value over several lines, since one of its lines may look like a row.

    Raises:
        DataError: the file is such a value; the message describes it.
    """
    if "\n" not in text.strip():
        return
    try:
        value = parse_json(text)
    except ValueError:
        return
    if isinstance(value, list):
        problem = "is one list over several lines; required one object a line, or the name .json"
    else:
        keys = ", ".join(value) if isinstance(value, dict) else ""
        problem = (
            f"is one JSON value over several lines (keys: {keys:.200}); required one object a "
            "line, or a list of objects and nothing around it"
        )
    raise DataError(f"data file {path}: {problem}.")


def _lines(text: str) -> FileRows:
    found, blank = FileRows(), 0
    for number, line in enumerate(text.split("\n"), start=1):  # other line separators can occur in texts
        if not line.strip():
            blank += 1
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg})"
            found.add(NoRow(problem), f"line {number}, column {error.colno}")
        except _NotJson as error:
            found.add(NoRow(str(error)), f"line {number}")
        else:
            if row and isinstance(row, dict):
                found.add(row, f"line {number}")
            else:
                problem = "required one JSON object with columns a line"
                found.add(NoRow(problem), f"line {number}")
    _note_blank(found, blank - text.endswith("\n"))
    return found


def _items(text: str, path: Path) -> FileRows:
    """Read a list item by item, so that each has a line number."""
    found, line, seen = FileRows(), 1, 0
    try:
        for index, (start, value) in enumerate(_of_list(text)):
            line, seen = line + text.count("\n", seen, start), start
            place = f"item {index} (line {line})"
            if value and isinstance(value, dict):
                found.add(value, place)
            else:
                found.add(NoRow("required an object with columns"), place)
    except json.JSONDecodeError as error:
        raise DataError(
            f"data file {path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})."
        ) from error
    except _NotJson as error:
        raise DataError(f"data file {path}: from line {line}: {error}.") from error
    return found


def _of_list(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (index of the first character, value) of each item of a JSON list."""
    place = _past_blank(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        value, end = _decoded(text, place)
        yield place, value
        place = _past_blank(text, end)
        if text[place : place + 1] == ",":
            place = _past_blank(text, place + 1)
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Illegal trailing comma before end of array", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if _past_blank(text, place + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, place + 1)


def _past_blank(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    return match.end() if match else place


class _NotJson(ValueError):
    """A text that is not JSON or cannot be used; the message gives the reason for the user."""


def parse_json(text: str) -> Any:
    """Parse a JSON value strictly: no repeated keys, and no NaN.

    Raises:
        ValueError: the text is not such a value.
    """
    value, end = _decoded(text, _past_blank(text, 0))
    if (end := _past_blank(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """Return a JSON value and the index after its last character.

    Raises:
        JSONDecodeError: the text is not JSON, with the position.
        _NotJson: the value is outside the JSON standard, or cannot be represented.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        if "\\ud" in text[start:end].lower():  # an escape may be half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _NotJson("holds an unpaired surrogate") from None
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _NotJson("nested too deeply") from None
    except ValueError as error:
        raise _NotJson(f"not JSON ({error})") from None
    return value, end


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole(text: str) -> int | Written:
    if text == "-0":  # an integer would lose the sign
        return Written(text)
    try:
        return int(text)
    except ValueError:  # Python's own limit of 4,300 digits
        raise ValueError(f"a whole number of {len(text):,} digits; write it as text") from None


def _finite(text: str) -> Written:
    number = Written(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is beyond all floats")
    return number


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"'{_repeated(name for name, _ in pairs):.80}' stands twice in an object")
    return values


_DECODER = json.JSONDecoder(
    parse_constant=_no_number, parse_float=_finite, parse_int=_whole, object_pairs_hook=_different_keys
)


def _repeated(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def read_csv(path: Path) -> FileRows:
    """Read comma-separated values by RFC 4180; every value is text.

    A quote inside a field that does not begin with a quote is text.

    Raises:
        DataError: the file is not UTF-8, its header has a repeated or missing name, a quoted field
            is not closed (with its lines), or there are no rows.
    """
    found, blank, first = FileRows(), 0, 1
    usual = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_ended_lines(_text_of(path)), strict=True)
    try:
        header = _header(next(filter(None, reader), None), path)
        first = reader.line_num + 1
        for fields in reader:
            blank += not fields
            if fields:
                _add(found, header, fields, first)
            first = reader.line_num + 1
    except csv.Error as error:
        last = reader.line_num
        lines = f"line {last}" if last <= first else f"lines {first} to {last}"
        problem = str(error)
        if "new-line character" in problem:
            problem = "a carriage return outside quotes that does not end a line"
        raise DataError(
            f"data file {path}: {lines}: {problem}; required RFC 4180: a field that begins with a "
            'quote ends with one, a quote inside it is written "", and a field with line breaks '
            "is quoted."
        ) from error
    finally:
        csv.field_size_limit(usual)
    _note_blank(found, blank)
    return _some(found, path)


def _ended_lines(text: str) -> Iterator[str]:
    """Yield lines with their line ends, which are carriage returns in a file without line feeds."""
    yield from StringIO(text, newline="\n" if "\n" in text else "\r")


def read_tsv(path: Path) -> FileRows:
    """Read tab-separated values, without quoting: every line is a row, and quotes are text.

    Raises:
        DataError: the file is not UTF-8, its header has a repeated or missing name, a field seems to
            span lines, or there are no rows.
    """
    text = _text_of(path)
    lines = [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]
    top = next((index for index, line in enumerate(lines) if line), None)
    names = _header(None if top is None else lines[top].split("\t"), path)
    found, opened, quoted, open_ended = FileRows(), 0, 0, 0
    for number, line in enumerate(lines, start=1):
        if not line or number - 1 == top:
            continue
        fields = line.split("\t")
        before, opened = opened, number if _opens(fields[-1]) else 0
        if len(fields) != len(names) and (opened or before == number - 1):
            begun = before if before == number - 1 else opened
            raise DataError(
                f"data file {path}: line {number}: a field seems to span lines (a quote opens in "
                f"line {begun}), which TSV does not have; required one line a row, or CSV."
            )
        _add(found, names, fields, number)
        quoted += any(map(_closed, fields))
        open_ended += any(map(_opens, fields))
    if quoted:
        found.notes.append(f"{quoted:,} rows have fields in quotes, which are text in TSV")
    if open_ended:
        found.notes.append(
            f"{open_ended:,} rows have fields that begin with a quote and do not end with one; "
            "they are text in TSV, and each line is a row"
        )
    _note_blank(found, sum(not line for line in lines[:-1]))
    return _some(found, path)


def _closed(text: str) -> bool:
    """Return whether a text looks like a field quoted by another program."""
    return len(text) > 1 and text[0] == text[-1] == '"'


def _opens(text: str) -> bool:
    """Return whether a text begins with a quote that is not closed in it."""
    return text.startswith('"') and not _closed(text)


def _header(names: list[str] | None, path: Path) -> list[str]:
    if not names:  # a byte order mark alone, or a blank line
        raise DataError(f"data file {path}: {_NOTHING}")
    nameless = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if nameless:
        raise DataError(
            f"data file {path}: line 1: a column has no name (column {nameless[0]} of {len(names)})"
            "; required a name for each: name it, or leave it out (of pandas: `index=False`)."
        )
    if len(set(names)) < len(names):
        raise DataError(f"data file {path}: line 1: column '{_repeated(names):.80}' is given twice.")
    return names


def _add(found: FileRows, header: list[str], fields: list[str], line: int) -> None:
    if len(fields) == len(header):
        found.add(dict(zip(header, fields, strict=True)), f"line {line}")
    else:
        problem = f"required {len(header)} fields, got {len(fields)}"
        found.add(NoRow(problem), f"line {line}")


def _note_blank(found: FileRows, blank: int) -> None:
    if blank > 0:
        found.notes.append(f"{blank:,} blank lines")


def _some(found: FileRows, path: Path) -> FileRows:
    if not found.rows:
        raise DataError(f"data file {path}: {_NOTHING}")
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path}: required UTF-8 text; byte {error.start} is not.") from error
