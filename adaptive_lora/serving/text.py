"""Prompts and greedy generation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .greedy import end_tokens, greedy
from .padded import pads_left
from .tokens import known_ids, padding_id, position_limit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def render(template: Mapping[str, str], prompt: str, context: str = "") -> str:
    """Fill a prompt template; braces inside the data are not changed."""
    text = template["with_input"] if context else template["without_input"]
    values = {"prompt": prompt, "input": context}
    return re.sub(r"\{(prompt|input)\}", lambda match: values[match.group(1)], text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Continue prompts greedily, shortest first in batches, and return texts in the given order.

    Args:
        model: causal language model, with or without adapter.
        tokenizer: tokenizer of the model.
        prompts: token ids per prompt.
        max_new_tokens: maximum number of new tokens per prompt; fewer if the model has no positions
            for them. A prompt that leaves no position gets an empty text.
        batch_size: number of prompts per call of the model.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # End-of-text fills finished rows: with a pad token, transformers warns of padding in its loop.
    pad, ends = int(tokenizer.eos_token_id), end_tokens(model, tokenizer)
    limit = free_positions(model)
    # PEFT ignores positions beside virtual tokens, so that no row may be padded. Near the limit,
    # padding would take positions from the answer.
    together = 0 if virtual_tokens(model) > 0 else limit - max_new_tokens
    if len(prompts) > 1 and together > 0 and not pads_left(model):
        batch_size = 1
    texts = [""] * len(prompts)
    for chosen in _batches(order, prompts, batch_size, together):
        ids, mask = _left_padded([prompts[index] for index in chosen], pad, model.device)
        room = min(max_new_tokens, limit - ids.shape[1])
        if room < 1:
            continue
        found = greedy(
            model,
            tokenizer,
            {"input_ids": ids, "attention_mask": mask},
            max_new_tokens=room,
            ends=ends,
            pad=pad,
            skip=ids.shape[1],
        )
        for index, text in zip(chosen, found, strict=True):
            texts[index] = text
    return texts


def free_positions(model: Any) -> int:
    """Return the maximum number of tokens of prompt plus answer; unlimited if the model gives no limit."""
    limit = position_limit(model.config)
    return 2**31 if limit is None else limit - virtual_tokens(model)


def virtual_tokens(model: Any) -> int:
    """Return the number of positions that a model adds before its inputs, with outputs for them.

    Prompt tuning and P-tuning add some; the tokens of a prefix are in the cache and have no outputs.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        return 0
    return int(config.num_virtual_tokens)


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], batch_size: int, together: int
) -> Iterator[list[int]]:
    """Yield batches of prompt indices, in order; prompts longer than `together` are batched separately."""
    batch: list[int] = []
    for index in order:
        length = len(prompts[index])
        other = batch and length > together and length != len(prompts[batch[0]])
        if other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def generate_targets(
    model: Any, tokenizer: Any, inputs: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Generate targets greedily with an encoder-decoder model, and return texts in the given order.

    Args:
        model: model with or without adapter.
        tokenizer: tokenizer of the model.
        inputs: token ids of the encoder's input, per text.
        max_new_tokens: maximum number of new tokens per text; fewer if the model has no positions
            for them.
        batch_size: number of inputs per call of the model.
    """
    import torch

    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    pad, ends = padding_id(tokenizer, known_ids(model)), end_tokens(model, tokenizer)
    assert pad is not None
    limit = position_limit(model.config)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit)
    texts = [""] * len(inputs)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(inputs[index]) for index in chosen)
        ids = torch.full((len(chosen), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, : len(inputs[index])] = torch.tensor(inputs[index], dtype=torch.long)
            mask[row, : len(inputs[index])] = 1
        found = greedy(
            model,
            tokenizer,
            {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)},
            max_new_tokens=room,
            ends=ends,
            pad=pad,
            skip=1,
        )
        for index, text in zip(chosen, found, strict=True):
            texts[index] = text
    return texts
