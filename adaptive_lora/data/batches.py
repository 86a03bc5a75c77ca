"""Batches: padded tensors, in an order that depends on nothing but the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive_lora.data.tokens import TokenizedExample
from adaptive_lora.seeding import rng_for

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of tokens whose loss does not count (PyTorch's and transformers' convention)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B examples padded on the right to T tokens."""

    input_ids: torch.Tensor
    """(B, T) token ids."""
    attention_mask: torch.Tensor
    """(B, T) 1 for tokens, 0 for padding."""
    labels: torch.Tensor
    """(B, T) token ids where the loss counts, IGNORED elsewhere; not shifted."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )

    def parts(self, rows: int) -> list[Batch]:
        """Return the batch in parts of at most so many examples, in order."""
        if rows >= len(self.input_ids):
            return [self]
        fields = (self.input_ids, self.attention_mask, self.labels)
        return [
            Batch(input_ids=ids, attention_mask=mask, labels=labels)
            for ids, mask, labels in zip(*(f.split(rows) for f in fields), strict=True)
        ]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens whose loss counts."""
        return int((self.labels != IGNORED).sum())


def collate(examples: Sequence[TokenizedExample], pad_id: int) -> Batch:
    """Pad examples on the right."""
    import torch

    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, example.first_label : len(ids)] = ids[example.first_label :]
    return Batch(input_ids=input_ids, attention_mask=mask, labels=labels)


def training_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, seed: int, pad_id: int
) -> Iterator[Batch]:
    """Yield batches without end, epoch after epoch, each in its own order.

    The order depends on the seed and the epoch alone, so every method of a seed sees the same.
    The last batch of an epoch may be smaller.
    """
    epoch = 0
    while True:
        order = rng_for(seed, "order", epoch).permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield collate([examples[i] for i in order[start : start + batch_size]], pad_id)
        epoch += 1
