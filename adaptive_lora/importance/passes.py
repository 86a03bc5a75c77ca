"""Passes: calibration batches joined, with every second example in the second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from adaptive_lora.data import Batch
from adaptive_lora.data.batches import IGNORED

PASS_TOKENS = 4096
"""Most padded tokens of one pass: calibration batches are joined up to it. Activations of a pass
are held at once, as in a training step; a longer batch is a pass of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Examples that go through the model at once."""

    batch: Batch
    split: int
    """Examples before it belong to the first half of the calibration data."""

    def half(self, second: int) -> Batch | None:
        """Return the examples of a half, or None where there is none."""
        chosen = slice(self.split, None) if second else slice(0, self.split)
        if len(self.batch.input_ids[chosen]) == 0:
            return None
        return Batch(
            input_ids=self.batch.input_ids[chosen],
            attention_mask=self.batch.attention_mask[chosen],
            labels=self.batch.labels[chosen],
        )


def joined(batches: Sequence[Batch], limit: int | None = None) -> list[Batch]:
    """Join batches up to `limit` (4,096) padded tokens; a longer one stays alone."""
    return [each.batch for each in halved(batches, limit)]


def halved(batches: Sequence[Batch], limit: int | None = None) -> list[Pass]:
    """Join batches into passes of `limit` (4,096) padded tokens at most, or of one batch.

    Counted over all batches, every second example belongs to the second half; a pass has those of
    the first half in front.
    """
    most = PASS_TOKENS if limit is None else limit
    groups: list[list[Batch]] = []
    width = rows = 0
    for batch in batches:
        count, length = batch.input_ids.shape
        width, rows = max(width, length), rows + count
        if not groups or width * rows > most:
            groups.append([])
            width, rows = length, count
        groups[-1].append(batch)
    padded = [batch for batch in batches if not batch.attention_mask.all()]
    pad = int(padded[0].input_ids[padded[0].attention_mask == 0][0]) if padded else 0
    passes, seen = [], 0
    for group in groups:
        passes.append(_stacked(group, pad, seen))
        seen += len(passes[-1].batch.input_ids)
    return passes


def _stacked(batches: Sequence[Batch], pad: int, seen: int) -> Pass:
    width = max(batch.input_ids.shape[1] for batch in batches)
    count = sum(len(batch.input_ids) for batch in batches)
    order = sorted(range(count), key=lambda index: (seen + index) % 2)

    def widened(name: str, value: int) -> torch.Tensor:
        rows = [getattr(batch, name) for batch in batches]
        return torch.cat([functional.pad(r, (0, width - r.shape[1]), value=value) for r in rows])

    return Pass(
        batch=Batch(
            input_ids=widened("input_ids", pad)[order],
            attention_mask=widened("attention_mask", 0)[order],
            labels=widened("labels", IGNORED)[order],
        ),
        split=(count + (seen + 1) % 2) // 2,
    )
