"""Texts as rows of integers: cut at a model's maximum length, and padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptive_lora.serving.greedy import filled, mask_of

Encoded = dict[str, list[list[int]]]


def encode_cut(
    tokenizer: Any, texts: Sequence[str], most: int, second: Sequence[str | None] | None = None, **options: Any
) -> tuple[Encoded, list[int]]:
    """Return encoded texts, and the number of tokens cut off of each.

    Args:
        tokenizer: tokenizer of the base.
        texts: one text per example.
        most: maximum number of tokens, including those that the tokenizer adds.
        second: second text of each pair, or None; the longer one is cut.
        options: further options of the tokenizer.

    Returns:
        Name of an input -> the integers of each text; and the number of tokens cut off per text.
    """
    # With `verbose`, transformers would warn of texts longer than the base's maximum.
    encoded: Encoded = dict(tokenizer(list(texts), second, verbose=False, **options))
    whole = [len(ids) for ids in encoded["input_ids"]]
    long = [index for index, length in enumerate(whole) if length > most]
    if long:
        pairs = None if second is None else [second[index] for index in long]
        first = [texts[index] for index in long]
        kept = tokenizer(first, pairs, truncation=True, max_length=most, **options)
        for name in encoded:
            for index, numbers in zip(long, kept[name], strict=True):
                encoded[name][index] = numbers
    return encoded, [n - len(ids) for n, ids in zip(whole, encoded["input_ids"], strict=True)]


def with_end(ids: Sequence[int], end: int | None) -> tuple[int, ...]:
    """Return a response's tokens with the end-of-text token."""
    return tuple(ids) if end is None or (ids and ids[-1] == end) else (*ids, end)


def padded(rows: Sequence[Mapping[str, Sequence[int]]], padding: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return a tensor (B, T) of each input of B texts, and their attention mask.

    Args:
        rows: per text, name of an input -> one integer per token.
        padding: name of an input -> its padding value, where that is not 0.
    """
    inputs = {name: filled([row[name] for row in rows], padding.get(name, 0)) for name in rows[0]}
    return {**inputs, "attention_mask": mask_of([row["input_ids"] for row in rows])}
