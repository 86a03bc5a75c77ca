"""Texts truncated at a model's maximum length, with the number of tokens cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    lost = [n - len(ids) for n, ids in zip(whole, encoded["input_ids"], strict=True)]
    return encoded, lost
