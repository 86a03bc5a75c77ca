"""Passes: calibration batches joined, and every second example of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from adaptive_lora.data import Batch
from adaptive_lora.data.batches import IGNORED

PASS_TOKENS = 4096
"""Most padded tokens of one pass: calibration batches are joined up to it. Activations of a pass
are held at once, as in a training step; a longer batch is a pass of its own."""


def joined(batches: Sequence[Batch], limit: int | None = None) -> list[Batch]:
    """Join batches in order into passes of `limit` (4,096) padded tokens at most, or one batch."""
    if any(type(batch) is not Batch for batch in batches):
        return list(batches)  # a loss of its own may read fields that cannot be joined here
    most = PASS_TOKENS if limit is None else limit
    passes: list[list[Batch]] = []
    width = rows = 0
    for batch in batches:
        count, length = batch.input_ids.shape
        width, rows = max(width, length), rows + count
        if not passes or width * rows > most:
            passes.append([])
            width, rows = length, count
        passes[-1].append(batch)
    padded = [batch for batch in batches if not batch.attention_mask.all()]
    pad = int(padded[0].input_ids[padded[0].attention_mask == 0][0]) if padded else 0
    return [_stacked(group, pad) for group in passes]


def half_of(batches: Sequence[Batch], half: int) -> list[Batch]:
    """Return every second example of batches, from the first (0) or the second (1), in passes."""
    return [
        Batch(
            input_ids=joint.input_ids[start::2],
            attention_mask=joint.attention_mask[start::2],
            labels=joint.labels[start::2],
        )
        for joint, start in _starts(joined(batches), half)
        if len(joint.input_ids) > start
    ]


def _starts(passes: Sequence[Batch], half: int) -> Iterator[tuple[Batch, int]]:
    """Yield passes with the index of each one's first example of a half."""
    seen = 0
    for batch in passes:
        yield batch, (half + seen) % 2
        seen += len(batch.input_ids)


def _stacked(batches: Sequence[Batch], pad: int) -> Batch:
    width = max(batch.input_ids.shape[1] for batch in batches)

    def widened(name: str, value: int) -> torch.Tensor:
        rows = [getattr(batch, name) for batch in batches]
        return torch.cat([functional.pad(r, (0, width - r.shape[1]), value=value) for r in rows])

    return Batch(
        input_ids=widened("input_ids", pad),
        attention_mask=widened("attention_mask", 0),
        labels=widened("labels", IGNORED),
    )
