"""Texts cut at the longest that a model takes, with the number of tokens that are lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Encoded = dict[str, list[list[int]]]


def encode_cut(
    tokenizer: Any, texts: Sequence[str], most: int, second: Sequence[str | None] | None = None, **options: Any
) -> tuple[Encoded, list[int]]:
    """Return texts as their tokenizer encodes them, and how many tokens of each were cut off.

    Args:
        tokenizer: of the base.
        texts: one an example.
        most: tokens that are kept, those that the tokenizer adds among them.
        second: the second text of each, where these are pairs; the longer one is cut.
        options: further ones of the tokenizer.

    Returns:
        Name of an input -> the numbers of each text; and the number of tokens lost.
    """
    # `verbose` would have transformers warn of texts longer than the base takes.
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
