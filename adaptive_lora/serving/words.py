"""Texts of separate words as token ids, with the place of each word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from .tokens import encode


@dataclass(frozen=True, kw_only=True)
class EncodedWords:
    """Token ids of a text, and the index of each word's first token."""

    ids: list[int]
    places: list[int]
    """Index of the first token of each word; fewer than words where the text was cut."""
    lost: int
    """Number of tokens cut off."""


def encode_words(tokenizer: Any, texts: Sequence[Sequence[str]], most: int) -> Iterator[EncodedWords]:
    """Yield encoded texts of words, joined by blanks and cut at a maximum length.

    Args:
        tokenizer: tokenizer of the base.
        texts: words of each text, without blanks inside.
        most: maximum number of tokens, including those that the tokenizer adds.

    Raises:
        ValueError: a word has no token of its own.
    """
    for words, found in zip(texts, encode(tokenizer, [" ".join(words) for words in texts]), strict=True):
        starts = [end - len(word) - 1 for word, end in zip(words, accumulate(len(w) + 1 for w in words), strict=True)]
        places = [found.first_token(start) for start in starts]
        merged = next((at for at, (a, b) in enumerate(pairwise([*places, found.stop])) if a >= b), None)
        if merged is not None:
            raise ValueError(f"word {merged} ({words[merged]!r:.50}) has no token of its own")
        around = found.ids[: found.start], found.ids[found.stop :]
        stop = min(found.stop, most - len(around[1]))
        yield EncodedWords(
            ids=[*around[0], *found.ids[found.start : stop], *around[1]],
            places=[place for place in places if place < stop],
            lost=found.stop - stop,
        )
