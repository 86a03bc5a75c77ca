"""Usable and bad rows: bad rows are refused or left out, and always reported."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from adaptive_lora.config import DataConfig
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for

T = TypeVar("T")
MOST_NAMED = 20
"""Maximum number of bad rows named in one message."""
_LONGEST = 200
"""Maximum number of characters of a bad row's problem where several are named."""


class BadRow(DataError):
    """A row that cannot be used."""

    def __init__(self, where: str, problem: str, *, reason: str | None = None) -> None:
        """Make the error of one row.

        Args:
            where: place of the row, such as `rows.csv line 12`.
            problem: the problem of this row, a clause without a full stop.
            reason: the problem in a form equal for all rows that have it; None: `problem` itself.
        """
        super().__init__(f"{where}: {problem}.")
        self.where, self.reason = where, problem if reason is None else reason


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A bad row that was left out."""

    where: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Record of how a source was read: its rows and the use of its columns."""

    source: str
    """Name of the source: file name, hub id or `embedded`."""
    rows: int
    """Number of rows in the source, including invalid lines."""
    drawn: int
    """Number of rows drawn by `max_examples`, before bad rows were left out."""
    columns: Mapping[str, str]
    """Column -> its use."""
    unused: tuple[str, ...] = ()
    """Names of the columns that are not used."""
    left_out: tuple[LeftOut, ...] = ()
    """Bad rows that were left out, in order."""
    notes: tuple[str, ...] = ()
    """Further remarks for the user, such as the number of blank lines."""

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> number of rows left out for it."""
        return Counter(row.reason for row in self.left_out)


def drawn(count: int, config: DataConfig) -> Sequence[int]:
    """Return the indices of `max_examples` rows, drawn by `split_seed`, in order."""
    if config.max_examples is None or config.max_examples >= count:
        return range(count)
    chosen = rng_for(config.split_seed, "subset").choice(count, config.max_examples, replace=False)
    return [int(index) for index in sorted(chosen)]


def left_out(bad: Sequence[BadRow], config: DataConfig, source: str) -> tuple[LeftOut, ...]:
    """Return bad rows as records of rows left out, if the user chose `on_bad_row` skip.

    Raises:
        DataError: the user did not; the message names up to 20 rows.
    """
    if not bad or config.on_bad_row == "skip":
        return tuple(LeftOut(row.where, row.reason) for row in bad)
    advice = "Correct the data, or leave such rows out with --on-bad-row skip."
    if len(bad) == 1:
        raise DataError(f"{bad[0]}\n{advice}")
    lines = [_shortened(str(row)) for row in bad[:MOST_NAMED]]
    if len(bad) > MOST_NAMED:
        lines.append(f"... and {len(bad) - MOST_NAMED:,} more")
    listed = "\n  ".join(lines)
    raise DataError(f"{source}: {len(bad):,} rows cannot be used:\n  {listed}\n{advice}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def counted(reasons: Mapping[str, int]) -> str:
    """Return reasons with their numbers of rows as text, the most frequent first."""
    listed = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count:,} {reason}" for reason, count in listed)


def text_of(row: Mapping[str, Any], column: str | None, where: str) -> str:
    """Return a value as written in the file; empty where it is absent or null.

    Text stays text, numbers keep their digits, and booleans are `true` and `false`.

    Raises:
        BadRow: the value is a list, an object, bytes, a date, NaN or infinite, or has a NUL
            character or an unpaired surrogate.
    """
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    text = scalar_text(value)
    if text is None:
        got = value if isinstance(value, float) else type(value).__name__
        raise BadRow(where, f"column '{column}' must be text, got {got}")
    if "\0" in text or (not text.isprintable() and not _encodes(text)):
        raise BadRow(where, f"column '{column}' holds a NUL sign or an unpaired surrogate")
    return text


def scalar_text(value: Any) -> str | None:
    """Return a text, number or boolean as text; None for any other value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return format(value, "f")
    return str(value) if isinstance(value, str | int | float) else None


def required_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return a text of a row; raise BadRow if it is empty."""
    text = text_of(row, column, where)
    if not text.strip():
        raise BadRow(where, f"column '{column}' is empty")
    return text


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unused_columns(columns: Iterable[str], used: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns that are not used, in order."""
    return tuple(column for column in columns if column not in used)


MEANINGFUL = (
    "system", "system_prompt", "system_message", "history", "tools", "functions", "documents",
    "chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio",
)  # fmt: skip
"""Columns that other programs use as part of the prompt."""
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_scale", "train")
"""Columns that other programs use as the weight of a row in the loss."""


def refuse_unread(row: Mapping[str, Any], used: Iterable[str], where: str) -> None:
    """Refuse a row with a column that other programs use for prompt or loss and that is not read here.

    Args:
        row: row of a table.
        used: names of the columns that are read.
        where: place of the row.

    Raises:
        BadRow: there is such a column; the message names it.
    """
    for column in MEANINGFUL:
        value = row.get(column)
        if column not in used and value is not None and value not in ("", [], {}):
            raise _unread(column, where, "say it in conversations (`messages`)")
    refuse_weights(row, used, where)


def refuse_weights(row: Mapping[str, Any], used: Iterable[str], where: str) -> None:
    """Refuse a row whose weight in the loss differs from 1; as `refuse_unread`."""
    for column in _WEIGHTS:
        value = row.get(column)
        if column not in used and value is not None and value != "" and not _is_one(value):
            raise _unread(column, where, "leave out rows that are not to be learned")


def _unread(column: str, where: str, way: str) -> BadRow:
    return BadRow(
        where,
        f"column '{column}' changes what is learned and is not read here; {way}, or drop or rename the column",
        reason=f"column '{column}' is not read here",
    )


def _is_one(value: Any) -> bool:
    """Return whether a weight is the default: 1 or true, as number or text."""
    text = str(value).strip().lower()
    return text == "true" or (not not_numeral(text) and float(text) == 1)


_NUMERAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def not_numeral(value: Any) -> bool:
    """Return whether a value is text that is not a number in ASCII decimal digits.

    Python's own `float` also accepts `1_000` and digits of other scripts.
    """
    return isinstance(value, str) and _NUMERAL.fullmatch(value) is None
