"""Tokenisation of texts by a base's tokenizer, in training and serving.

A text is encoded as a whole, once. The starts of its segments are found by the tokens' offsets,
because a segment encoded alone may get other ids: SentencePiece adds a blank before each text, and a
tokenizer may add an end token after each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

_AT_ONCE = 1000
"""Number of texts per call of a tokenizer, limited because their offsets take memory."""
_OFFSET = frozenset({"camembert", "roberta", "xlm-roberta"})
"""Model types whose positions begin after the padding index."""
_SHOWN = 5
"""Maximum number of tokens named in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedText:
    """A text's token ids, including those that the tokenizer adds around every text."""

    text: str
    ids: list[int]
    start: int
    """Index of the text's first token, equal to the number of tokens added before it."""
    stop: int
    """Index of the first token added after the text; `len(ids)` if there is none."""
    tokenizer: Any
    encoding: Any
    """Encoding of the library `tokenizers`; None for a tokenizer written in Python."""

    def first_token(self, place: int) -> int:
        """Return the index of the first token of the segment that begins at a character.

        A token that spans the character belongs to the segment that begins there, as in transformers'
        assistant mask; a special token that absorbed white space of it does not.
        """
        if place >= len(self.text):
            return self.stop
        if self.encoding is None:
            return self._first_by_prefix(place)
        found = self.encoding.char_to_token(place)
        if found is None:  # white space without offsets
            ends = accumulate((end for _, end in self.encoding.offsets[self.start : self.stop]), max)
            found = self.start + bisect_right(list(ends), place)
        swallowed = self._spans(found, place) and self.ids[found] in self.tokenizer.added_tokens_decoder
        return int(found) + swallowed

    def end_token(self, place: int) -> int:
        """Return the index after the last token of the segment that ends before a character."""
        found = self.first_token(place)
        return found + self._spans(found, place)

    def _spans(self, index: int, place: int) -> bool:
        """Return whether a token begins before a character and ends after it."""
        if self.encoding is None or not self.start <= index < self.stop:
            return False
        start, end = self.encoding.token_to_chars(index)
        return bool(start < place < end)

    def _first_by_prefix(self, place: int) -> int:
        """Return the number of leading tokens that the text up to a character shares with the whole text."""
        (before,) = encode(self.tokenizer, [self.text[:place]], special_tokens=self.start > 0)
        pairs = zip(before.ids[: before.stop], self.ids[: self.stop], strict=False)
        return max(self.start, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))


def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True) -> Iterator[EncodedText]:
    """Yield encoded texts.

    Args:
        tokenizer: tokenizer of the base.
        texts: texts of any length.
        special_tokens: whether to add special tokens around them; False for the output of a chat
            template, which has them.
    """
    for at in range(0, len(texts), _AT_ONCE):
        chosen = list(texts[at : at + _AT_ONCE])
        # With `verbose`, transformers would warn of texts longer than the base's maximum.
        found = tokenizer(chosen, add_special_tokens=special_tokens, verbose=False)
        encodings = found.encodings or [None] * len(chosen)
        longest = max(range(len(chosen)), key=lambda index: len(chosen[index]))
        front, rear = _around(tokenizer, encodings[longest]) if special_tokens else (0, 0)
        for text, ids, encoding in zip(chosen, found["input_ids"], encodings, strict=True):
            yield EncodedText(
                text=text, ids=ids, start=front, stop=len(ids) - rear, tokenizer=tokenizer, encoding=encoding
            )


def prompt_ids(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
    """Return the token ids of prompts, without an end token.

    Args:
        tokenizer: tokenizer of the base.
        texts: prompts as text.
        special_tokens: as for `encode`.
    """
    encoded = encode(tokenizer, texts, special_tokens=special_tokens)
    return [each.ids[: each.stop] for each in encoded]


def _around(tokenizer: Any, encoding: Any) -> tuple[int, int]:
    """Return how many tokens a tokenizer adds before and after every text."""
    if encoding is not None:
        mask = encoding.special_tokens_mask
        if all(mask):  # no text in between
            mask = tokenizer("a").encodings[0].special_tokens_mask
        front = len(list(takewhile(bool, mask)))
        return front, len(list(takewhile(bool, mask[:front:-1])))
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(body) + 1)
    front = next((at for at in places if whole[at : at + len(body)] == body), 0)
    return front, len(whole) - len(body) - front


def position_limit(settings: Any) -> int | None:
    """Return the maximum number of tokens by a base's settings; None if they give no limit.

    XLNet's -1 means no limit.
    """
    text = settings.get_text_config()
    names = ("max_position_embeddings", "max_target_positions")  # the latter of Whisper's decoder
    stated = next((int(found) for name in names if (found := getattr(text, name, None))), -1)
    if stated < 0:
        return None
    return stated - int(text.pad_token_id) - 1 if text.model_type in _OFFSET else stated


def known_ids(model: Any) -> int | None:
    """Return the number of token ids for which a model has both embeddings and outputs.

    None if it has neither under transformers' names.
    """
    sizes = []
    for part in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError, AttributeError):
            found = getattr(model, part)()
            # Not the weight's shape, which differs if it is packed.
            sizes += [getattr(found, "num_embeddings", getattr(found, "out_features", None))]
    return min((int(size) for size in sizes if size), default=None)


def unknown_ids(tokenizer: Any, rows: Iterable[Sequence[int]], known: int | None) -> str | None:
    """Return a text on tokens without a row in the base's embeddings, or None if there are none.

    Args:
        tokenizer: tokenizer of the base.
        rows: token ids to run.
        known: `known_ids` of the base.
    """
    if known is None:
        return None
    beyond = {token for ids in rows if max(ids, default=0) >= known for token in ids}
    listed = sorted(token for token in beyond if token >= known)
    if not listed:
        return None
    names = [f"'{tokenizer.decode([token])}' ({token})" for token in listed[:_SHOWN]]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (
        f"the tokenizer gives ids up to {listed[-1]}, and the embeddings have {known} rows (ids 0 "
        f"to {known - 1}); no row for {', '.join(names)}{more}"
    )


def padding_id(tokenizer: Any, known: int | None) -> int | None:
    """Return the padding token id: the tokenizer's own if the base has it, otherwise end-of-text.

    Args:
        tokenizer: tokenizer of the base.
        known: `known_ids` of the base.
    """
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    usable = (token for token in given if token is not None and token >= 0)
    return next((int(token) for token in usable if known is None or token < known), None)


def set_padding(model: Any, pad: int) -> None:
    """Set the padding id of a classifying decoder, whose head reads the last token that is not padding."""
    for settings in (model.config, model.config.get_text_config()):
        settings.pad_token_id = pad


def set_for_decoder(tokenizer: Any, pad: int) -> None:
    """Set a tokenizer's padding and inputs for a classifying decoder.

    Segment ids are left out, because GPT-2 would add an embedding for them.
    """
    tokenizer.pad_token_id = pad
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
