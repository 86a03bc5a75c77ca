"""Whether a model can run on packed rows: asked of the model itself, by a small example."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from adaptive_lora.data import PackedBatch
from adaptive_lora.kernels.attention import attend, packed_attention, unwrapped
from adaptive_lora.kernels.causal import head_of, supervised

_LENGTHS = (7, 3, 12)
_PROBE = "adaptive_lora_probe"
_TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}
"""Of the difference in logits, as a share of the largest; a wrong mask gives about 1."""


def packing_problem(model: Any) -> str | None:
    """Return why a causal language model must run on padded batches, or None where it can pack.

    Three short sequences go through the model one by one and as one packed row; the logits must
    agree. So positions, windows, masks and what the head does to logits are seen as built. A small
    difference may still be a leak: a convolution or a recurrence over positions mixes sequences by
    as little as its weights are. So nothing of a sequence may depend on another either: the
    gradient there must be zero, exactly.
    """
    inner = unwrapped(model)
    if has_prompt(model):
        return "a learned prompt stands before each sequence"
    if not inner._supports_attention_backend:
        return "its attention takes no function from outside"
    was_training = inner.training
    inner.eval()
    try:
        return _compare(inner)
    except Exception as error:  # a model's own code meets a form of input that it may not know
        return f"it does not run on a packed row ({type(error).__name__}: {str(error)[:200]})"
    finally:
        inner.train(was_training)


def has_prompt(model: Any) -> bool:
    """Return whether virtual tokens or a prefix stand before each sequence."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _compare(inner: Any) -> str | None:
    device = inner.get_input_embeddings().weight.device
    batch = _example(inner.config.get_text_config()).to(device)
    with torch.no_grad():
        alone = [
            inner(input_ids=ids[None]).logits[0] for ids in batch.input_ids[0].split(batch.lengths)
        ]
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
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= _TOLERANCE[inner.dtype]:  # NaN too
        return f"a packed row gives other logits (relative difference {difference:.1g})"
    if leak:
        return "what it computes over positions, such as a convolution, mixes a row's sequences"
    return None


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
    # A plain sum would not do: that of a layer norm's outputs is the same whatever goes in.
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
    return PackedBatch(
        input_ids=ids[None], position_ids=positions[None], targets=ids, lengths=_LENGTHS
    )


def _limited(config: Any) -> bool:
    """Return whether some layers see only part of what comes before."""
    windowed = getattr(config, "sliding_window", None) is not None
    if not getattr(config, "use_sliding_window", True):
        windowed = False
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return windowed and (kinds != set() or getattr(config, "layer_types", None) is None)
