"""Plain greedy search: the most likely token at each step, until an end token.

A checkpoint's own settings (generation_config.json: sampling, beams, penalties, suppressed or forced
tokens) are not applied; only its start and end tokens are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

_SAID = "quixotic"
"""Answer in a rendered conversation, used to find the text that the template adds after it."""
_OWN = ("generation_config", "generate")
"""Attributes with a checkpoint's own generation settings and code."""
_LOCK = RLock()
"""Lock for one generation at a time, because it changes settings of the model."""


def greedy(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    ends: tuple[int, ...],
    pad: int,
    skip: int,
) -> list[str]:
    """Return the text generated for each row by greedy search, without end tokens.

    Args:
        model: model with or without adapter.
        tokenizer: tokenizer of the model.
        inputs: inputs of the model's `generate`, on its device.
        max_new_tokens: maximum number of new tokens per row.
        ends: end tokens, from `end_tokens`.
        pad: padding token of rows that ended before others.
        skip: number of leading tokens to remove: the prompt, or the decoder's start.
    """
    import torch
    from transformers import GenerationConfig

    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        decoder_start_token_id=decoder_start(model),
    )
    with torch.no_grad(), without_own_settings(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")
        output = model.generate(**inputs, generation_config=plain)
    texts = []
    for row in output[:, skip:].tolist():
        written = next((row[:at] for at, token in enumerate(row) if token in ends), row)
        texts.append(str(tokenizer.decode(written, skip_special_tokens=True)).strip())
    return texts


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Remove a checkpoint's own generation settings and code inside the block.

    An explicit configuration is not sufficient: `generate` fills missing settings from the model's.
    """
    from transformers import GenerationConfig

    with _LOCK:
        kept = []
        for module in model.modules():
            own = vars(module)
            kept.append((own, {name: own[name] for name in _OWN if name in own}))
            if "generation_config" in own:
                own["generation_config"] = GenerationConfig()
            own.pop("generate", None)
        try:
            yield
        finally:
            for own, settings in kept:
                own.update(settings)


def end_tokens(model: Any, processor: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer, in order.

    They are the tokenizer's end token, the checkpoint's `eos_token_id`, and the special token that
    ends an assistant's turn in the chat template.

    Args:
        model: model with or without adapter.
        processor: tokenizer, or processor with a tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = {tokenizer.eos_token_id, *_named_ends(model, tokenizer), turn_end(processor)}
    return tuple(sorted(token for token in found if token is not None and token >= 0))


def turn_end(processor: Any) -> int | None:
    """Return the special token that ends an assistant's turn in the chat template.

    If there is none after the last answer, it is the one that begins the next turn. None if there is
    no template, or if it marks turns by ordinary text.
    """
    if not getattr(processor, "chat_template", None):
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    special = _special(tokenizer) - {tokenizer.unk_token_id}
    for shown in (2, 3):
        rest = _after_answer(processor, shown)
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
        end = next((int(token) for token in ids if token in special), None)
        if end is not None:
            return end
    return None


def _after_answer(processor: Any, messages: int) -> str:
    """Return the text that the template adds after an answer, the second of two or three messages."""
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": _SAID},
        {"role": "user", "content": "Two?"},
    ]
    if hasattr(processor, "tokenizer"):  # of images and texts: contents are lists of items
        for each in talk:
            each["content"] = [{"type": "text", "text": each["content"]}]
    try:
        text = str(processor.apply_chat_template(talk[:messages], tokenize=False))
    except Exception:  # a template may fail in any way; then it has no end token
        return ""
    _, answered, rest = text.rpartition(_SAID)
    return rest if answered else ""


def _named_ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens of `eos_token_id` in configuration and generation_config.json.

    The default of a configuration class is ignored if it is an ordinary token of this tokenizer.
    """
    settings = [model.config, model.config.get_text_config()]
    unchosen = {getattr(type(each), "eos_token_id", None) for each in settings}
    special = _special(tokenizer)
    found: set[int] = set()
    for each in (*settings, *_proposed(model)):
        named = getattr(each, "eos_token_id", None)
        if isinstance(named, list | tuple):
            found.update(map(int, named))
        elif named is not None and (named in special or named not in unchosen):
            found.add(int(named))
    return found


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}


def _proposed(model: Any) -> list[Any]:
    """Return the generation settings of a checkpoint, and of models inside it."""
    owned = [vars(module) for module in model.modules()]
    return [own["generation_config"] for own in owned if "generation_config" in own]


def decoder_start(model: Any) -> int | None:
    """Return the start token of a decoder, as in training; None without an encoder."""
    for settings in (model.config, *_proposed(model)):
        found = getattr(settings, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    return None
