"""A table as people read it, with the numbers behind the text for sorting."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from adaptive_lora.analysis.comparison import Spread
from adaptive_lora.analysis.comparison.wording import (
    ABSENT,
    count,
    interval_text,
    p_text,
    percent,
    plain,
    signed,
    spread_text,
)
from adaptive_lora.analysis.stats import Interval


class Cell(NamedTuple):
    """One entry: what is shown, and the number that it is sorted by (None: sorted last)."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table as text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def without_empty_columns(self) -> TextTable:
        """Return the table without the columns in which no row has anything."""
        kept = [
            column for column in range(len(self.head)) if any(row[column].text not in ("", ABSENT) for row in self.rows)
        ]
        return dataclasses.replace(
            self,
            head=tuple(self.head[column] for column in kept),
            rows=tuple(tuple(row[column] for column in kept) for row in self.rows),
        )


def signed_cell(value: float | None, digits: int = 4) -> Cell:
    """Return a difference with its sign, or n/a."""
    return Cell(ABSENT) if value is None else Cell(signed(value, digits), value)


def plain_cell(value: float | None, digits: int = 4) -> Cell:
    """Return a number with fixed digits, or n/a."""
    return Cell(plain(value, digits), value)


def general_cell(value: float | None) -> Cell:
    """Return a number as short as it can be written, such as a learning rate, or n/a."""
    return Cell(ABSENT) if value is None else Cell(f"{value:g}", value)


def interval_cell(interval: Interval | None, digits: int = 4) -> Cell:
    """Return an interval, sorted by its lower end, or n/a."""
    if interval is None:
        return Cell(ABSENT)
    return Cell(interval_text(interval, digits), interval.low)


def plain_interval_cell(interval: Interval, digits: int = 4) -> Cell:
    """Return an interval of a value that is not a difference, or n/a."""
    if interval.low is None or interval.high is None:
        return Cell(ABSENT)
    text = f"[{plain(interval.low, digits)}, {plain(interval.high, digits)}]"
    return Cell(text, interval.low)


def p_cell(p: float | None) -> Cell:
    """Return a p-value, or n/a."""
    return Cell(p_text(p), p)


def spread_cell(spread: Spread, digits: int = 4, scale: float = 1.0) -> Cell:
    """Return mean ± deviation, sorted by the mean, or n/a."""
    return Cell(spread_text(spread, digits, scale), spread.mean)


def count_cell(number: float | None) -> Cell:
    """Return a count, or n/a."""
    return Cell(count(number), number)


def percent_cell(share: float | None) -> Cell:
    """Return a share as signed percentage, or n/a."""
    return Cell(ABSENT) if share is None else Cell(percent(share), share)
