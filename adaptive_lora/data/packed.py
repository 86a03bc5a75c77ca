"""Packed batches: the examples of a batch concatenated in one row, without padding."""

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
    """B examples with N tokens in total, in one row; positions restart with each example."""

    input_ids: torch.Tensor
    """Token ids, shape (1, N)."""
    position_ids: torch.Tensor
    """Position of each token in its own example, shape (1, N)."""
    targets: torch.Tensor
    """Next token of the same example where it is supervised, IGNORED elsewhere, shape (N,)."""
    lengths: tuple[int, ...]
    """Number of tokens of each of the B examples."""

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
        """Number of tokens of all examples."""
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens."""
        return int((self.targets != IGNORED).sum())

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries of the examples: B + 1 cumulative lengths in tokens, from 0."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def owners(self) -> torch.Tensor:
        """Index of the example of each token, shape (N,)."""
        import torch

        lengths = torch.tensor(self.lengths, device=self.targets.device)
        return torch.repeat_interleave(lengths)


def unpadded(batch: Batch) -> PackedBatch:
    """Return a right-padded batch of texts as one row, with the examples in order."""
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
    """Concatenate examples into one row."""
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
