"""Batches: padded tensors, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from adaptive_lora.data.tokens import TokenizedExample
from adaptive_lora.seeding import rng_for

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of tokens that are excluded from the loss (PyTorch's and transformers' convention)."""
_PIXELS_PER_POSITION = 256
"""Number of pixels that count as one text position: a patch of 16 x 16."""
_FRAMES_PER_POSITION = 2
"""Number of log-mel frames that Whisper's encoder joins to one position."""
_TEXTS = ("input_ids", "decoder_input_ids")
_MASKS = ("attention_mask", "decoder_attention_mask")
_CONTENT = ("input_ids", "pixel_values", "input_features")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B examples: inputs of the model, and labels for loss and scores."""

    inputs: Mapping[str, torch.Tensor]
    """Arguments of the model's forward call; the first dimension of each is the example.
    Texts are padded on the right and come with an attention mask."""
    labels: torch.Tensor
    """Targets of the loss, shape (B, ...), IGNORED where there is none; for causal models token
    ids, not shifted."""
    padding: Mapping[str, int] = field(default_factory=dict)
    """Name of an input -> its padding value, where that is not 0."""
    whole: bool = False
    """Mark of a batch whose loss compares examples with each other, so that it must not be divided."""

    @classmethod
    def of_text(cls, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Return a batch of token ids, mask (0 for padding) and labels, each of shape (B, T)."""
        return cls(inputs={"input_ids": input_ids, "attention_mask": attention_mask}, labels=labels)

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids, shape (B, T)."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> torch.Tensor:
        """Attention mask, shape (B, T): 1 for tokens, 0 for padding."""
        return self.inputs["attention_mask"]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def positions(self) -> int:
        """Number of positions per example in the model, including padding, image patches and frames of sound."""
        texts = (self.inputs[name].shape[1] for name in _TEXTS if name in self.inputs)
        longest = max(texts, default=0)
        if "input_features" in self.inputs:
            longest = max(longest, self.inputs["input_features"].shape[-1] // _FRAMES_PER_POSITION)
        if "pixel_values" not in self.inputs:
            return longest
        pixels = self.inputs["pixel_values"]
        patches = pixels[0].numel() // 3 // _PIXELS_PER_POSITION + 1
        return max(longest, patches)

    def parts(self, rows: int) -> list[Batch]:
        """Return the batch as micro-batches of at most `rows` examples, in order; whole if it cannot be divided."""
        if rows >= self.examples or self.whole:
            return [self]
        return [self.rows(slice(at, at + rows)) for at in range(0, self.examples, rows)]

    @property
    def tokens(self) -> int:
        """Number of tokens without padding; number of images where there is no text."""
        masks = [self.inputs[name] for name in _MASKS if name in self.inputs]
        return sum(int(mask.sum()) for mask in masks) if masks else self.examples

    @property
    def supervised(self) -> torch.Tensor:
        """Mask of the labels that enter the loss: bool, shape of `labels`."""
        return self.labels.isfinite() if self.labels.is_floating_point() else self.labels != IGNORED

    @property
    def supervised_by_example(self) -> torch.Tensor:
        """Number of supervised tokens, or other targets of the task, per example, shape (B,)."""
        return self.supervised.flatten(1).sum(dim=1) if self.labels.ndim > 1 else self.supervised

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens, or other targets of the task; the loss is divided by it."""
        return int(self.supervised.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=moved, labels=self.labels.to(device))

    def rows(self, chosen: slice | Sequence[int]) -> Batch:
        """Return some of the examples, with the batch's padding."""
        kept = {name: tensor[chosen] for name, tensor in self.inputs.items()}
        return replace(self, inputs=kept, labels=self.labels[chosen])

    def content(self) -> bytes:
        """Return token ids and pixels as bytes, for digests."""
        shown = (self.inputs[name] for name in _CONTENT if name in self.inputs)
        return b"".join(tensor.numpy().tobytes() for tensor in shown)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Return several batches of one task as one; texts are padded to the longest."""
    first = batches[0]
    return replace(
        first,
        inputs={
            name: _joint([batch.inputs[name] for batch in batches], first.padding.get(name, 0)) for name in first.inputs
        },
        labels=_joint([batch.labels for batch in batches], IGNORED),
    )


def _joint(tensors: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Concatenate along examples; the second dimension is padded."""
    import torch
    from torch.nn import functional

    if tensors[0].ndim != 2:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([functional.pad(t, (0, width - t.shape[1]), value=padding) for t in tensors])


def collate(examples: Sequence[TokenizedExample], pad_id: int) -> Batch:
    """Pad examples of a causal language model on the right."""
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
        for start, end in example.gaps:
            labels[row, start:end] = IGNORED
    return Batch(inputs={"input_ids": input_ids, "attention_mask": mask}, labels=labels, padding={"input_ids": pad_id})


def training_batches(
    examples: Sequence[T], *, batch_size: int, seed: int, collate: Callable[[Sequence[T]], Batch]
) -> Iterator[Batch]:
    """Yield batches endlessly, epoch after epoch, each epoch in its own order.

    The order depends on the seed and the epoch alone, so every method of a seed sees the same.
    The last batch of an epoch may be smaller.
    """
    epoch = 0
    while True:
        order = rng_for(seed, "order", epoch).permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield collate([examples[i] for i in order[start : start + batch_size]])
        epoch += 1
