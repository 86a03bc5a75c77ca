"""Tokenised examples with the boundary between prompt and response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Self

from adaptive_lora.data.conversations import turns
from adaptive_lora.data.examples import Example
from adaptive_lora.data.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ROOM = "prompts leave no room for a response within max_tokens"
"""Reason for which rows are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedExample:
    """Token ids of prompt, response and end-of-text."""

    id: str
    input_ids: tuple[int, ...]
    first_label: int
    """Index of the first supervised token: the prompt's length, or 1 where all is learned."""
    prompt_length: int
    response: str
    gaps: tuple[tuple[int, int], ...] = ()
    """Spans (from, to) after `first_label` that are not learned: what others say in between."""
    cut: int = 0
    """Tokens that `max_tokens` left out at the end."""

    @property
    def length(self) -> int:
        """Tokens that go through the model."""
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens whose loss counts."""
        between = sum(end - start for start, end in self.gaps)
        return len(self.input_ids) - self.first_label - between

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return what tokenising gave: ids, and where the parts begin and end."""
        places = (self.first_label, self.prompt_length, *chain.from_iterable(self.gaps))
        return {"input_ids": self.input_ids, "places": places, "cut": (self.cut,)}

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Return it from an example and its `numbers`."""
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
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    loss_on: str,
) -> tuple[TokenizedExample, ...]:
    """Tokenise prompts and responses apart, so that the boundary is the one of generation.

    Responses are cut at `max_tokens`; what was cut has no end-of-text token. Of conversations the
    assistant's turns are learned, as the tokenizer's chat template writes them.

    Raises:
        DataError: a prompt leaves no room for its response; names the example.
    """
    items = tuple(examples)
    if any(item.messages for item in items):
        return tuple(_conversation(item, tokenizer, max_tokens, loss_on) for item in items)
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    responses = tokenizer([item.response for item in items], add_special_tokens=False)["input_ids"]
    eos = int(tokenizer.eos_token_id)
    return tuple(
        _example(item, [*prompt], [*response, eos], max_tokens, loss_on)
        for item, prompt, response in zip(items, prompts, responses, strict=True)
    )


def _conversation(
    item: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int, loss_on: str
) -> TokenizedExample:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for text, answers in turns(item, tokenizer):
        start = len(ids)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        spans += [(start, len(ids))] if answers else []
    prompt_length, ids = spans[-1][0], ids[:max_tokens]
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
        prompt_length=min(prompt_length, learned[-1][1]),
        response=item.response,
        gaps=gaps,
        cut=spans[-1][1] - learned[-1][1],
    )


def _example(
    item: Example, prompt: list[int], response: list[int], max_tokens: int, loss_on: str
) -> TokenizedExample:
    ids = (prompt + response)[:max_tokens]
    first_label = max(1, len(prompt)) if loss_on == "response" else 1
    if len(ids) <= first_label or len(prompt) >= max_tokens:
        raise BadRow(
            item.where,
            f"no supervised token, because its prompt takes {len(prompt)} of max_tokens="
            f"{max_tokens}; raise max_tokens or shorten the prompt",
            reason=NO_ROOM,
        )
    return TokenizedExample(
        id=item.id,
        input_ids=tuple(ids),
        first_label=first_label,
        prompt_length=len(prompt),
        response=item.response,
        cut=len(prompt) + len(response) - len(ids),
    )
