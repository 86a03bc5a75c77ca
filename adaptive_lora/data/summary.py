"""What a run reads: the block that it begins with, and that is kept with the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_lora.data.rows import Reading

_MOST_ROWS = 1000
"""Most left-out rows that a record names."""
_MOST_NAMES = 30
"""Most columns that the block names; the record has all."""
_MOST_CHARACTERS = 1500
"""Most characters of the example; of a longer one beginning and end are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSize:
    """Size of one part of the data."""

    examples: int
    supervised_tokens: int
    """Tokens whose loss counts; predictions, of tasks that have one an example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSummary:
    """Rows read and left out, columns, template, parts, cuts, and one example with its loss."""

    task: str
    readings: tuple[Reading, ...]
    """How the source was read, and then that of the test part where it is another."""
    template: str
    """Name of the prompt template."""
    parts: Mapping[str, PartSize]
    """Part of the first fold -> its size."""
    folds: int
    tested_prompts: int
    """Examples that are not used, because the test part has their prompts."""
    longest: int | None
    """Most tokens of an example; None where examples have no tokens."""
    cut_examples: int
    """Examples that were cut at `longest`."""
    examples: int
    """Examples of all parts."""
    lost_tokens: int
    """Tokens of all parts that were cut off."""
    tokens: int
    """Tokens of all parts that are left."""
    example: str
    """The first training example as text, with what is learned of it in [[ ]]."""
    where: str
    """Place of that example."""

    @property
    def share_lost(self) -> float:
        """Share of all tokens that were cut off."""
        return self.lost_tokens / max(1, self.lost_tokens + self.tokens)

    @property
    def left_out(self) -> int:
        """Rows of all sources that cannot be used."""
        return sum(len(reading.left_out) for reading in self.readings)

    def lines(self) -> list[str]:
        """Return the block: a name and what there is to say of it, one a line."""
        said = reading_lines(self.readings)
        said.append(f"task      {self.task}; template: {self.template}")
        sizes = ", ".join(
            f"{name} {part.examples:,} examples ({part.supervised_tokens:,} supervised)"
            for name, part in self.parts.items()
        )
        said.append(f"parts     {sizes}{f'; fold 0 of {self.folds}' if self.folds > 1 else ''}")
        if self.tested_prompts:
            said.append(f"          {self.tested_prompts:,} examples not used: the test part has "
                        "their prompts")  # fmt: skip
        if self.longest is not None:
            said.append(f"cut       {self._cut()}")
        said.append(f"example   {self.where}, what is learned in [[ ]]:")
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
        """Return the figures that every trial keeps, by the names of its parameters."""
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
        """Return the record, JSON-ready, with the block as people read it."""
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
    """Return an example's text, of a long one beginning and end."""
    half = _MOST_CHARACTERS // 2
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def reading_lines(readings: Sequence[Reading]) -> list[str]:
    """Return what there is to say of how sources were read, the test part's own last."""
    return [line for index, one in enumerate(readings) for line in _read(one, index)]


def _read(reading: Reading, index: int) -> Sequence[str]:
    name = "data" if index == 0 else "test data"
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
    """Return names of columns; of many, the first."""
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
