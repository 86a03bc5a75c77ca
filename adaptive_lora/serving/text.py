"""Prompts and greedy generation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .greedy import batches_of, filled, greedy_batches, mask_of, pads_left
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
    limit = free_positions(model)
    # PEFT ignores positions beside virtual tokens, so that no row may be padded. Near the limit,
    # padding would take positions from the answer.
    together = 0 if virtual_tokens(model) > 0 else limit - max_new_tokens
    if len(prompts) > 1 and together > 0 and not pads_left(model):
        batch_size = 1
    # End-of-text fills finished rows: with a pad token, transformers warns of padding in its loop.
    pad = int(tokenizer.eos_token_id)

    def inputs_of(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = [prompts[index] for index in chosen]
        return {"input_ids": filled(rows, pad, left=True), "attention_mask": mask_of(rows, left=True)}

    batches = batches_of(prompts, batch_size, together=together)
    return greedy_batches(model, tokenizer, batches, inputs_of, max_new_tokens=max_new_tokens, pad=pad, limit=limit)


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
    pad = padding_id(tokenizer, known_ids(model))
    assert pad is not None
    limit = position_limit(model.config)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit)

    def inputs_of(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = [inputs[index] for index in chosen]
        return {"input_ids": filled(rows, pad), "attention_mask": mask_of(rows)}

    model.eval()
    batches = batches_of(inputs, batch_size)
    return greedy_batches(model, tokenizer, batches, inputs_of, max_new_tokens=room, pad=pad, skip=1)
