"""Checks of a model's behaviour on packed rows and padding, by running small examples."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from adaptive_lora.data import PackedBatch
from adaptive_lora.models.kernels.attention import attend, packed_attention, unwrapped
from adaptive_lora.models.kernels.causal import head_of, supervised
from adaptive_lora.serving.greedy import filled, mask_of

_LENGTHS = (7, 3, 12)
_PROBE = "adaptive_lora_probe"
_TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}
"""Type of weights -> maximum difference in logits, relative to the largest; a wrong mask gives about 1."""


def packing_problem(model: Any) -> str | None:
    """Return why a causal language model must run on padded batches, or None if it can run on packed rows.

    Three short sequences run through the model one by one and as one packed row; the logits must
    agree. This covers positions, windows, masks and the head's scaling of logits as built. A small
    difference may still be a leak: a convolution or recurrence over positions mixes sequences by as
    little as its weights are. So a sequence must also not depend on another one: the gradient must
    be exactly zero.
    """
    inner = unwrapped(model)
    if has_prompt(model):
        return "a learned prompt precedes each sequence"
    if not inner._supports_attention_backend:
        return "its attention takes no function from outside"
    was_training = inner.training
    inner.eval()
    try:
        return _compare(inner)
    except Exception as error:  # a model's own code may not support packed input
        return f"it does not run on a packed row ({type(error).__name__}: {str(error)[:200]})"
    finally:
        inner.train(was_training)


@torch.no_grad()
def causality_problem(model: Any) -> str | None:
    """Return how the logits of a model depend on later tokens, or None if they do not.

    A row runs twice with different last tokens; the logits before them must be equal. Bidirectional
    models of this class (XLNet) would learn to copy the next token.
    """
    ids = _example(model.config.get_text_config()).input_ids
    ids = ids.to(model.get_input_embeddings().weight.device)
    kept = _LENGTHS[0]
    other = ids.clone()
    other[:, kept:] = ids[0, 0]
    first, second = (model(input_ids=row).logits[0, :kept].float() for row in (ids, other))
    if not (first.isfinite().all() and second.isfinite().all()):
        return None  # a broken base cannot be checked; its scores will show it
    # Equal shapes: only rounding in other groups of a mixture of experts may differ.
    within = _TOLERANCE[model.dtype] / (100 if model.dtype.itemsize > 2 else 5)
    return _differing("tokens at the end change the logits before them", first, second, within)


@torch.no_grad()
def padding_problem(model: Any) -> str | None:
    """Return how the outputs of a classifier depend on padding, or None if they do not.

    A short text runs alone and in a batch with a longer one, padded on the right.
    """
    text = model.config.get_text_config()
    short, _, longer = _example(text).input_ids[0].split(_LENGTHS)
    rows, device = [short.tolist(), longer.tolist()], model.get_input_embeddings().weight.device
    ids, mask = filled(rows, int(text.pad_token_id)).to(device), mask_of(rows).to(device)
    alone = model(input_ids=ids[:1, : len(short)], attention_mask=mask[:1, : len(short)])
    beside = model(input_ids=ids, attention_mask=mask)
    return _differing(
        "a text has other outputs alone than in a batch with a longer one",
        alone.logits[0].float(),
        beside.logits[0].float(),
        _TOLERANCE[model.dtype],
    )


def _differing(what: str, first: torch.Tensor, second: torch.Tensor, within: float) -> str | None:
    difference = float((first - second).abs().max() / second.abs().max())
    if difference <= within:  # false for NaN
        return None
    return f"{what} (relative difference {difference:.1g})"


def has_prompt(model: Any) -> bool:
    """Return whether virtual tokens or a prefix precede each sequence."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def is_invoked(model: Any) -> bool:
    """Return whether an adapter acts from certain tokens on alone (aLoRA), which PEFT finds in its own forward pass."""
    return bool(getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None))


def _compare(inner: Any) -> str | None:
    device = inner.get_input_embeddings().weight.device
    batch = _example(inner.config.get_text_config()).to(device)
    with torch.no_grad():
        alone = [inner(input_ids=ids[None]).logits[0] for ids in batch.input_ids[0].split(batch.lengths)]
    wanted = torch.cat(alone).float()
    windows: set[int | None] = set()

    def watched(*args: Any, **kwargs: Any) -> Any:
        windows.add(kwargs.get("sliding_window"))
        return attend(*args, **kwargs)

    AttentionInterface.register(_PROBE, watched)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    with packed_attention(inner, _PROBE):
        hidden, leak = _packed(inner, batch)
    with torch.no_grad():
        found = head_of(inner).logits(hidden)
    if not windows:
        return "its attention takes no function from outside"
    if _limited(inner.config.get_text_config()) and windows == {None}:
        return "its attention window does not reach a function from outside"
    difference = _differing("a packed row gives other logits", found, wanted, _TOLERANCE[inner.dtype])
    if difference is None and leak:
        return "what it computes over positions, such as a convolution, mixes a row's sequences"
    return difference


@torch.enable_grad()
def _packed(inner: Any, batch: PackedBatch) -> tuple[torch.Tensor, bool]:
    """Return the hidden states of a packed row, and whether one depends on another sequence."""
    given: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    handle = inner.get_input_embeddings().register_forward_hook(keep)
    try:
        hidden = supervised(inner, batch).hidden
    finally:
        handle.remove()
    # A plain sum is not sufficient: the sum of a layer norm's outputs does not depend on its input.
    weights = torch.linspace(1.0, 2.0, hidden.shape[1], device=hidden.device)
    leak = False
    for begin, end in pairwise(batch.boundaries):
        total = (hidden[begin:end].float() * weights).sum()
        (gradient,) = torch.autograd.grad(total, given[0], retain_graph=True)
        gradient[:, begin:end] = 0
        leak |= bool(gradient.any())
    return hidden.detach(), leak


def _example(config: Any) -> PackedBatch:
    """Return sequences of low token ids; every position is supervised, to compare all logits."""
    count = sum(_LENGTHS)
    ids = torch.arange(count) % min(97, config.vocab_size)
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])
    return PackedBatch(input_ids=ids[None], position_ids=positions[None], targets=ids, lengths=_LENGTHS)


def _limited(config: Any) -> bool:
    """Return whether some layers have a limited attention window."""
    windowed = getattr(config, "sliding_window", None) is not None
    if not getattr(config, "use_sliding_window", True):
        windowed = False
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return windowed and (kinds != set() or getattr(config, "layer_types", None) is None)
