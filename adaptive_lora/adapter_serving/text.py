"""Prompts and greedy generation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def render(template: Mapping[str, str], prompt: str, context: str = "") -> str:
    """Fill a prompt template; braces inside the data stay as they are."""
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
        tokenizer: of the same model.
        prompts: token ids per prompt.
        max_new_tokens: most tokens generated per prompt; fewer where the model has no positions for
            them.
        batch_size: prompts per call of the model.
    """
    import torch

    alone = virtual_tokens(model) > 0  # PEFT ignores positions then, so that no row may be padded
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # End-of-text fills finished rows: with a pad token, transformers warns of padding in its loop.
    pad = int(tokenizer.eos_token_id)
    texts = [""] * len(prompts)
    for chosen in _batches(order, prompts, batch_size, one_length=alone):
        ids, mask = _left_padded([prompts[index] for index in chosen], pad, model.device)
        room = min(max_new_tokens, _positions(model) - virtual_tokens(model) - ids.shape[1])
        if room < 1:
            continue
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=pad,
            )
        for index, row in zip(chosen, output[:, ids.shape[1] :], strict=True):
            texts[index] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts


def _positions(model: Any) -> int:
    """Return how many tokens a model can see; no limit where it states none."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return 2**31 if stated is None else int(stated)


def virtual_tokens(model: Any) -> int:
    """Return how many positions a model puts before its inputs, and gives outputs for.

    Prompt tuning and P-tuning do; the tokens of a prefix stand in the cache and give no outputs.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        return 0
    return int(config.num_virtual_tokens)


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], batch_size: int, *, one_length: bool
) -> Iterator[list[int]]:
    """Yield prompts by number, in order; where asked, only such of one length together."""
    batch: list[int] = []
    for index in order:
        other = batch and one_length and len(prompts[index]) != len(prompts[batch[0]])
        if other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def generate_targets(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Write targets greedily with an encoder and decoder, and return texts in the given order.

    Args:
        model: with or without adapter.
        tokenizer: of the same model.
        inputs: token ids that the encoder reads, per text.
        max_new_tokens: most tokens generated per text.
        batch_size: inputs per call of the model.
    """
    import torch

    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(inputs[index]) for index in chosen)
        ids = torch.full((len(chosen), width), int(tokenizer.pad_token_id), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, : len(inputs[index])] = torch.tensor(inputs[index], dtype=torch.long)
            mask[row, : len(inputs[index])] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        for index, row in zip(chosen, output, strict=True):
            texts[index] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts
