"""Passes: merged calibration batches, with every second example in the second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_lora.data import Batch, stacked

PASS_TOKENS = 4096
"""Most padded tokens of one pass: calibration batches are joined up to it. Activations of a pass
are held at once, as in a training step; a longer batch is a pass of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Examples of one forward pass."""

    batch: Batch
    split: int
    """Index of the first example of the second half of the calibration data."""

    def half(self, second: int) -> Batch | None:
        """Return the examples of a half, or None if there are none."""
        chosen = self.batch.rows(slice(self.split, None) if second else slice(0, self.split))
        return chosen if chosen.examples else None


def joined(batches: Sequence[Batch], limit: int | None = None) -> list[Batch]:
    """Merge batches up to `limit` (4,096) padded tokens; a longer batch is kept separate."""
    return [each.batch for each in halved(batches, limit)]


def halved(batches: Sequence[Batch], limit: int | None = None) -> list[Pass]:
    """Merge batches into passes of at most `limit` (4,096) padded tokens, or of one batch.

    Counted over all batches, every second example belongs to the second half; in a pass, those of the
    first half come first. A batch that is `whole` is not divided, and every second such batch belongs
    to the second half.
    """
    if any(batch.whole for batch in batches):
        return [Pass(batch=batch, split=0 if index % 2 else batch.examples) for index, batch in enumerate(batches)]
    most = PASS_TOKENS if limit is None else limit
    groups: list[list[Batch]] = []
    width = rows = 0
    for batch in batches:
        count, length = batch.examples, batch.positions
        width, rows = max(width, length), rows + count
        if not groups or width * rows > most:
            groups.append([])
            width, rows = length, count
        groups[-1].append(batch)
    passes, seen = [], 0
    for group in groups:
        passes.append(_ordered(stacked(group), seen))
        seen += passes[-1].batch.examples
    return passes


def _ordered(batch: Batch, seen: int) -> Pass:
    order = sorted(range(batch.examples), key=lambda index: (seen + index) % 2)
    return Pass(batch=batch.rows(order), split=(batch.examples + (seen + 1) % 2) // 2)
