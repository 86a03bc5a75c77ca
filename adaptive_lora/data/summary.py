"""Summary of the data that a run reads, printed at its start and stored with the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_lora.data.rows import Reading

_MOST_ROWS = 1000
"""Maximum number of left-out rows named in a record."""
_MOST_NAMES = 30
"""Maximum number of columns named in the printed summary; the record has all."""
_MOST_CHARACTERS = 1500
"""Maximum number of characters of the example; of longer ones, beginning and end are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSize:
    """Size of one split of the data."""

    examples: int
    supervised_tokens: int
    """Number of supervised tokens, or of predictions for tasks with one per example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSummary:
    """Rows read and left out, columns, template, splits, truncation, and one example with its supervised text."""

    task: str
    readings: tuple[Reading, ...]
    """Record of how the source was read, followed by that of a separate test source."""
    template: str
    """Name of the prompt template."""
    parts: Mapping[str, PartSize]
    """Split of the first fold -> its size."""
    folds: int
    tested_prompts: int
    """Number of examples removed because their prompt is also in the test split."""
    longest: int | None
    """Maximum number of tokens of an example; None where examples have no tokens."""
    cut_examples: int
    """Number of examples truncated at `longest` tokens."""
    examples: int
    """Number of examples of all splits."""
    lost_tokens: int
    """Number of tokens of all splits that were cut off."""
    tokens: int
    """Number of tokens of all splits after truncation."""
    example: str
    """The first training example as text, with its supervised text in [[ ]]."""
    where: str
    """Place of that example in the source."""
    name: str = "data"
    """Name of the source in the printed summary."""
    notes: tuple[str, ...] = ()
    """Further remarks for the user."""

    @property
    def share_lost(self) -> float:
        """Share of all tokens that were cut off, from 0 to 1."""
        return self.lost_tokens / max(1, self.lost_tokens + self.tokens)

    @property
    def left_out(self) -> int:
        """Number of bad rows left out, over all sources."""
        return sum(len(reading.left_out) for reading in self.readings)

    def lines(self) -> list[str]:
        """Return the summary as text, one item per line."""
        said = reading_lines(self.readings, self.name)
        said += [f"          {note}" for note in self.notes]
        said.append(f"task      {self.task}; template: {self.template}")
        sizes = ", ".join(
            f"{name} {part.examples:,} examples ({part.supervised_tokens:,} supervised)"
            for name, part in self.parts.items()
        )
        said.append(f"splits    {sizes}{f'; fold 0 of {self.folds}' if self.folds > 1 else ''}")
        if self.tested_prompts:
            said.append(f"          {self.tested_prompts:,} examples removed: their prompt is also "
                        "in the test split")  # fmt: skip
        if self.longest is not None:
            said.append(f"cut       {self._cut()}")
        said.append(f"example   {self.where}, supervised text in [[ ]]:")
        return [*said, *(f"  | {line}" for line in self.example.split("\n"))]

    def _cut(self) -> str:
        if not self.cut_examples:
            return f"none of {self.examples:,} examples at {self.longest:,} tokens"
        return (
            f"{self.cut_examples:,} of {self.examples:,} examples at {self.longest:,} tokens: "
            f"{self.lost_tokens:,} of {self.lost_tokens + self.tokens:,} tokens "
            f"({self.share_lost:.1%}) are lost; --max-tokens sets the limit"
        )

    def parameters(self) -> dict[str, Any]:
        """Return the figures that every trial records, by parameter name."""
        return {
            "data.rows_read": sum(reading.rows for reading in self.readings),
            "data.rows_left_out": self.left_out,
            "data.columns": "; ".join(_columns(reading) for reading in self.readings)[:500],
            "data.columns_unused": ", ".join(n for r in self.readings for n in r.unused)[:500],
            "data.template": self.template[:500],
            "data.examples_cut": self.cut_examples,
            "data.tokens_cut": self.lost_tokens,
            "data.share_of_tokens_cut": round(self.share_lost, 6),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values, including the printed summary."""
        return {
            "task": self.task,
            "sources": [_record(reading) for reading in self.readings],
            "template": self.template,
            "parts": {
                name: {"examples": part.examples, "supervised_tokens": part.supervised_tokens}
                for name, part in self.parts.items()
            },
            "folds": self.folds,
            "examples_with_tested_prompts": self.tested_prompts,
            "max_tokens": self.longest,
            "examples": self.examples,
            "examples_cut": self.cut_examples,
            "tokens": self.tokens,
            "tokens_cut": self.lost_tokens,
            "example": {"where": self.where, "text": self.example},
            "block": self.lines(),
        }


def shortened(text: str) -> str:
    """Return an example's text; of a long one, beginning and end."""
    half = _MOST_CHARACTERS // 2
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def reading_lines(readings: Sequence[Reading], name: str = "data") -> list[str]:
    """Return lines on how the sources were read, a separate test source last."""
    return [line for at, one in enumerate(readings) for line in _read(one, "test data" if at else name)]


def _read(reading: Reading, name: str) -> Sequence[str]:
    drawn = f", {reading.drawn:,} drawn by max_examples" if reading.drawn < reading.rows else ""
    said = [f"{name:<9} {reading.source}: {reading.rows:,} rows{drawn}"]
    unused = f"; not used: {_listed(reading.unused)}" if reading.unused else ""
    said.append(f"columns   {_columns(reading)}{unused}")
    first: dict[str, str] = {}
    for row in reading.left_out:
        first.setdefault(row.reason, row.where)
    for reason, count in reading.reasons.most_common():
        rows = f"{count:,} row{'s' if count > 1 else ''}"
        said.append(f"left out  {rows}: {reason} (first: {first[reason]})")
    return [*said, *(f"          {note}" for note in reading.notes)]


def _listed(names: Sequence[str]) -> str:
    """Return names of columns as text; of many, the first."""
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"{name:.80}" for name in names[:_MOST_NAMES]) + more


def _columns(reading: Reading) -> str:
    return ", ".join(f"{column}: {role}" for column, role in reading.columns.items())


def _record(reading: Reading) -> dict[str, Any]:
    return {
        "source": reading.source,
        "rows": reading.rows,
        "drawn": reading.drawn,
        "columns": dict(reading.columns),
        "columns_unused": list(reading.unused),
        "left_out": dict(reading.reasons),
        "left_out_rows": [{"where": row.where, "reason": row.reason} for row in reading.left_out[:_MOST_ROWS]],
        "notes": list(reading.notes),
    }
