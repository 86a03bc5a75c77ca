"""Padding of texts on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def padded(rows: Sequence[Mapping[str, Sequence[int]]], padding: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return a tensor (B, T) of each input of B texts, and their attention mask.

    Args:
        rows: per text, name of an input -> one integer per token.
        padding: name of an input -> its padding value, where that is not 0.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    inputs = {name: right(rows_of(rows, name), padding.get(name, 0)) for name in rows[0]}
    return {**inputs, "attention_mask": right([[1] * length for length in lengths], 0)}


def rows_of(rows: Sequence[Mapping[str, Sequence[int]]], name: str) -> list[Sequence[int]]:
    """Return one input of every text."""
    return [row[name] for row in rows]


def right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return rows padded on the right with a value, shape (B, T)."""
    full = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for index, row in enumerate(rows):
        full[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return full
