"""Packed batches: the examples of a batch one after another in a single row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from adaptive_lora.data.batches import IGNORED, Batch
from adaptive_lora.data.tokens import TokenizedExample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """B examples of N tokens in all, in one row; positions start anew with each example."""

    input_ids: torch.Tensor
    """(1, N) token ids."""
    position_ids: torch.Tensor
    """(1, N) position of each token in its own example."""
    targets: torch.Tensor
    """(N,) token that follows in the same example where its loss counts, IGNORED elsewhere."""
    lengths: tuple[int, ...]
    """Tokens per example, B in all."""

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on a device."""
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            targets=self.targets.to(device),
            lengths=self.lengths,
        )

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Tokens whose loss counts."""
        return int((self.targets != IGNORED).sum())

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where examples begin and end: B + 1 cumulative lengths from 0."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def owners(self) -> torch.Tensor:
        """(N,) index of the example that each token belongs to."""
        import torch

        lengths = torch.tensor(self.lengths, device=self.targets.device)
        return torch.repeat_interleave(lengths)


def unpadded(batch: Batch) -> PackedBatch:
    """Return a batch of texts, padded on the right, as one row; its examples stay in order."""
    import torch
    from torch.nn import functional

    seen = batch.attention_mask.bool()
    positions = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
    following = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    return PackedBatch(
        input_ids=batch.input_ids[seen][None],
        position_ids=positions[seen][None],
        targets=following[seen],
        lengths=tuple(seen.sum(dim=1).tolist()),
    )


def pack(examples: Sequence[TokenizedExample]) -> PackedBatch:
    """Put examples one after another into one row."""
    import torch

    ids = [token for example in examples for token in example.input_ids]
    positions = [at for example in examples for at in range(len(example.input_ids))]
    targets: list[int] = []
    for example in examples:
        first, tokens = example.first_label, example.input_ids
        own = [IGNORED] * (first - 1) + list(tokens[first:]) + [IGNORED]
        for start, end in example.gaps:
            own[start - 1 : end - 1] = [IGNORED] * (end - start)
        targets += own
    return PackedBatch(
        input_ids=torch.tensor([ids], dtype=torch.long),
        position_ids=torch.tensor([positions], dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        lengths=tuple(len(example.input_ids) for example in examples),
    )
