"""Passes over calibration data: batches merged or divided, with every second example in the second half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch, stacked

PASS_TOKENS = 4096
"""Most padded tokens of one pass where the caller names no limit: calibration batches are joined up to it.
Activations of a pass are held at once, as in a training step."""


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


def halved(batches: Sequence[Batch], limit: int | None = None, *, divide: bool = False) -> list[Pass]:
    """Merge batches into passes of at most `limit` (4,096) padded tokens, or of one batch.

    Counted over all batches, every second example belongs to the second half; in a pass, those of the
    first half come first. A batch that is `whole` is not divided, and every second such batch belongs
    to the second half.

    Args:
        batches: calibration batches.
        limit: most padded tokens of a pass.
        divide: whether a longer batch is divided into several passes, of one example at least.
    """
    if any(batch.whole for batch in batches):
        return [Pass(batch=batch, split=0 if index % 2 else batch.examples) for index, batch in enumerate(batches)]
    most = PASS_TOKENS if limit is None else limit
    if divide:
        batches = [
            part
            for batch in batches
            for part in batch.parts(1 if batch.examples * batch.positions > most else batch.examples)
        ]
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
    for batch in map(stacked, groups):
        order = sorted(range(batch.examples), key=lambda index: (seen + index) % 2)
        passes.append(Pass(batch=batch.rows(order), split=(batch.examples + (seen + 1) % 2) // 2))
        seen += batch.examples
    return passes


def grouped(sites: Sequence[AdapterSite], floats: Callable[[AdapterSite], int], limit: int) -> list[list[AdapterSite]]:
    """Divide sites into groups whose statistics have at most `limit` floats, or that are a single site."""
    groups: list[list[AdapterSite]] = []
    held = limit
    for site in sites:
        if held + floats(site) > limit:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += floats(site)
    return groups
