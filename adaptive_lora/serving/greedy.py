"""Plain greedy search in batches: the most likely token at each step, until an end token.

A checkpoint's own settings (generation_config.json: sampling, beams, penalties, suppressed or forced
tokens) are not applied; only its start and end tokens are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

_SAID = "quixotic"
"""Answer in a rendered conversation, used to find the text that the template adds after it."""
_OWN = ("generation_config", "generate")
"""Attributes with a checkpoint's own generation settings and code."""
_LOCK = RLock()
"""Lock for one generation at a time, because it changes settings of the model."""
_SHORT, _LONG = 3, 9
"""Number of tokens of the test prompt, and of the padded row."""
_WITHIN = {"float64": 1e-6, "float32": 1e-3}
"""Type of weights -> maximum difference in logits, relative to the largest."""
_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Base -> result of `pads_left`."""


def greedy(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    ends: tuple[int, ...],
    pad: int,
    skip: int,
    generate: Callable[..., Any] | None = None,
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
        generate: function to generate with; None: the model's own.
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
        output = (generate or model.generate)(**inputs, generation_config=plain)
    texts = []
    for row in output[:, skip:].tolist():
        written = next((row[:at] for at, token in enumerate(row) if token in ends), row)
        texts.append(str(tokenizer.decode(written, skip_special_tokens=True)).strip())
    return texts


def greedy_batches(
    model: Any,
    processor: Any,
    batches: Iterable[Sequence[int]],
    inputs_of: Callable[[Sequence[int]], Mapping[str, Any]],
    *,
    max_new_tokens: int,
    pad: int,
    limit: int | None = None,
    skip: int | None = None,
) -> list[str]:
    """Return the text generated for each row, in the order of the rows' indices.

    Args:
        model: model with or without adapter.
        processor: tokenizer, or processor with a tokenizer.
        batches: indices of the rows of each batch.
        inputs_of: function from these indices to the inputs of the model's `generate`.
        max_new_tokens: maximum number of new tokens per row.
        pad: padding token of rows that ended before others.
        limit: maximum number of tokens of a prompt and its text; a row without room gets an empty text.
        skip: number of leading tokens to remove; None: the prompt.
    """
    ends, texts = end_tokens(model, processor), dict[int, str]()
    for chosen in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in inputs_of(chosen).items()}
        width = int(inputs["input_ids"].shape[1])
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - width)
        found = [""] * len(chosen)
        if room > 0:
            tokenizer = getattr(processor, "tokenizer", processor)
            first = width if skip is None else skip
            found = greedy(model, tokenizer, inputs, max_new_tokens=room, ends=ends, pad=pad, skip=first)
        texts.update(zip(chosen, found, strict=True))
    return [texts[index] for index in sorted(texts)]


def batches_of(rows: Sequence[Sequence[int]], size: int, *, together: float = math.inf) -> Iterator[list[int]]:
    """Yield batches of rows' indices, shortest first; rows longer than `together` are batched by equal length."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        length = len(rows[index])
        other = batch and length > together and length != len(rows[batch[0]])
        if other or len(batch) == size:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def filled(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Any:
    """Return rows padded with a value, on the right unless `left`, as integers of shape (B, T)."""
    import torch

    full = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for index, row in enumerate(rows):
        at = slice(full.shape[1] - len(row), None) if left else slice(len(row))
        full[index, at] = torch.tensor(row, dtype=torch.long)
    return full


def mask_of(rows: Sequence[Sequence[int]], *, left: bool = False) -> Any:
    """Return the attention mask of padded rows, shape (B, T)."""
    return filled([[1] * len(row) for row in rows], 0, left=left)


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


def pads_left(model: Any) -> bool:
    """Return whether answers do not change with padding; otherwise each prompt must run alone.

    Masked attention ignores padding, but a recurrence reads it (RWKV, RecurrentGemma), and learned
    positions may count it (BART's decoder). A short prompt runs alone and padded: the logits must
    agree. With other tokens as padding they must be exactly equal, because a recurrence may forget
    most of its input.

    Args:
        model: generating model, with or without adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base not in _KNOWN:
        _KNOWN[base] = _same_when_padded(model, str(base.dtype).removeprefix("torch."))
    return _KNOWN[base]


def _same_when_padded(model: Any, dtype: str) -> bool:
    import torch

    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, 0, 0)
        padded, otherwise = (_logits(model, _LONG - _SHORT, pad) for pad in (0, 5))
    finally:
        model.train(was_training)
    rough = torch.is_autocast_enabled(model.device.type)
    within = 0.1 if rough else _WITHIN.get(dtype, 0.1)
    differs = (padded - alone).abs().max() > within * alone.abs().max()
    reads = (padded - otherwise).abs().max() > 1e-6 * padded.abs().max()
    return not bool(differs or reads)  # NaN gives no information and counts as no difference


def _logits(model: Any, padding: int, pad: int) -> Any:
    """Return the logits of the two tokens that `generate` adds to a short prompt."""
    import torch
    from transformers import GenerationConfig

    known = int(model.config.get_text_config().vocab_size)
    ids = torch.tensor([[pad % known] * padding + [at % known for at in range(1, _SHORT + 1)]])
    mask = torch.tensor([[0] * padding + [1] * _SHORT])
    plain = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=2, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad(), without_own_settings(model):
        found = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=plain
        )
    return torch.stack(found.logits).float()
