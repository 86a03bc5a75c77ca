"""Tokenised examples, with the boundary between prompt and response."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Self

import numpy as np

from adaptive_lora.data.conversations import turns
from adaptive_lora.data.examples import Example
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.sequences import batched
from adaptive_lora.serving.tokens import EncodedText, encode, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ROOM = "prompts leave no room for a response within max_tokens"
"""Reason for rows left out because of their prompt's length."""
_COMPARED = 64
"""Number of examples whose prompts are also encoded alone, as in serving, to compare the tokens."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedExample:
    """Token ids of prompt, response and end-of-text token."""

    id: str
    input_ids: tuple[int, ...]
    first_label: int
    """Index of the first supervised token: the prompt's length, or 1 with loss on all tokens."""
    prompt_length: int
    response: str
    gaps: tuple[tuple[int, int], ...] = ()
    """Token spans (from, to) after `first_label` without loss: messages of other roles."""
    cut: int = 0
    """Number of tokens cut off at the end by `max_tokens`."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens."""
        between = sum(end - start for start, end in self.gaps)
        return len(self.input_ids) - self.first_label - between

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return the result of tokenisation: ids, and the spans with and without loss."""
        places = (self.first_label, self.prompt_length, *chain.from_iterable(self.gaps))
        return {"input_ids": self.input_ids, "places": places, "cut": (self.cut,)}

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Restore a tokenised example from the example and its `numbers`."""
        first_label, prompt_length, *gaps = numbers["places"]
        return cls(
            id=example.id,
            input_ids=tuple(numbers["input_ids"]),
            first_label=first_label,
            prompt_length=prompt_length,
            response=example.response,
            gaps=tuple(zip(gaps[::2], gaps[1::2], strict=True)),
            cut=numbers["cut"][0],
        )


def tokenize(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, loss_on: str
) -> tuple[TokenizedExample, ...]:
    """Tokenise each prompt with its response as one text.

    Responses are cut at `max_tokens`; a cut response has no end-of-text token. Of conversations,
    the assistant's turns are supervised, as rendered by the tokenizer's chat template.

    Raises:
        DataError: a prompt leaves no room for its response; the message names the example.
    """
    return tuple(tokenized(tuple(examples), tokenizer, max_tokens=max_tokens, loss_on=loss_on))


def tokenized(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, loss_on: str
) -> Iterator[TokenizedExample]:
    """Yield the examples of `tokenize`, of which only some are in memory at a time."""
    talks = any(example.messages for example in examples)
    make, made, others = _conversation if talks else _example, 0, 0
    for items in batched(examples):
        pieces = [
            tuple(turns(item, tokenizer)) if talks else ((item.prompt, False), (item.response, True)) for item in items
        ]
        texts = ["".join(text for text, _ in each) for each in pieces]
        encoded = encode(tokenizer, texts, special_tokens=not talks)
        for item, each, parts in zip(items, encoded, pieces, strict=True):
            spans = _answers(each, parts)
            yield make(item, each, spans, max_tokens, loss_on)
            made += 1
            if made <= _COMPARED:
                others += _asked_otherwise(each, parts, spans[-1][0], special_tokens=not talks)
    if others:
        _log.warning(
            "%d of the first %d examples: the tokenizer merges the end of the prompt with the start "
            "of the answer, so that prompts have other tokens in serving than in training; end the "
            "template without white space.",
            others,
            min(made, _COMPARED),
        )


def _answers(encoded: EncodedText, parts: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Return the token spans (from, to) of the segments that are answers."""
    places = accumulate((len(text) for text, _ in parts), initial=0)
    return [
        (encoded.first_token(start), encoded.end_token(end))
        for (start, end), (_, answers) in zip(pairwise(places), parts, strict=True)
        if answers
    ]


def _asked_otherwise(
    encoded: EncodedText, parts: Sequence[tuple[str, bool]], first: int, *, special_tokens: bool
) -> bool:
    """Return whether the prompt of the last answer has other tokens alone than in the whole text."""
    last = max(index for index, (_, answers) in enumerate(parts) if answers)
    prompt = "".join(text for text, _ in parts[:last])
    if not prompt:
        return False
    (alone,) = prompt_ids(encoded.tokenizer, [prompt], special_tokens=special_tokens)
    return alone != encoded.ids[:first]


def _conversation(
    item: Example, encoded: EncodedText, spans: Sequence[tuple[int, int]], max_tokens: int, loss_on: str
) -> TokenizedExample:
    ids = encoded.ids[:max_tokens]
    learned = [(start, min(end, len(ids))) for start, end in spans if start < len(ids)]
    gaps = tuple((one[1], other[0]) for one, other in pairwise(learned))
    first = learned[0][0] if learned else len(ids)
    if loss_on == "all":
        first, gaps, learned = 1, (), [(1, len(ids))]
    if not learned or len(ids) <= max(1, first):
        raise BadRow(
            item.where,
            "no supervised token, because its first answer comes after max_tokens="
            f"{max_tokens}; raise max_tokens or shorten the conversation",
            reason=NO_ROOM,
        )
    return TokenizedExample(
        id=item.id,
        input_ids=tuple(ids[: learned[-1][1]]),
        first_label=max(1, first),
        prompt_length=min(spans[-1][0], learned[-1][1]),
        response=item.response,
        gaps=gaps,
        cut=spans[-1][1] - learned[-1][1],
    )


def _example(
    item: Example, encoded: EncodedText, spans: Sequence[tuple[int, int]], max_tokens: int, loss_on: str
) -> TokenizedExample:
    prompt, whole = spans[0][0], _ended(encoded)
    ids = whole[:max_tokens]
    first_label = max(1, prompt) if loss_on == "response" else 1
    if len(ids) <= first_label or prompt >= max_tokens:
        raise BadRow(
            item.where,
            f"no supervised token, because its prompt takes {prompt} of max_tokens="
            f"{max_tokens}; raise max_tokens or shorten the prompt",
            reason=NO_ROOM,
        )
    return TokenizedExample(
        id=item.id,
        input_ids=tuple(ids),
        first_label=first_label,
        prompt_length=prompt,
        response=item.response,
        cut=len(whole) - len(ids),
    )


def _ended(encoded: EncodedText) -> list[int]:
    """Return a text's token ids, with an end-of-text token if the tokenizer adds none."""
    end = int(encoded.tokenizer.eos_token_id)
    added = encoded.ids[encoded.stop :]
    if end in added:
        return encoded.ids[: encoded.stop + added.index(end) + 1]
    return encoded.ids if encoded.ids[-1] == end else [*encoded.ids, end]


def numbers_digest(rows: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """Return a digest over the integers of all examples in order, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            values = row[name]
            total.update(f"{name}\0{len(values)}\0".encode())
            total.update(np.asarray(values, dtype="<i8").tobytes())
        total.update(b"\n")
    return total.hexdigest()[:32]
