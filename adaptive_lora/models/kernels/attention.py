"""Attention in a packed row: each sequence separately, at the cost of the sum of n², not N².

transformers supports registered attention functions, which get query, key and value from models. The
sequences' boundaries are passed as the attention mask: transformers passes a four-dimensional mask on
unchanged, and gradient checkpointing keeps it for the recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from adaptive_lora.serving.custom_tuner import AdaptedModel

NAME = "adaptive_lora_packed"
"""Name of the registered attention function."""


class NotPacked(RuntimeError):
    """A model needs a feature that packed attention lacks; it must run on padded batches."""


def boundary_mask(boundaries: Sequence[int]) -> torch.Tensor:
    """Return boundaries in the mask shape that models pass through: (1, 1, 1, B + 1).

    The tensor stays on the CPU, so that no layer waits for a GPU to read lengths.
    """
    return torch.tensor(boundaries, dtype=torch.int32).view(1, 1, 1, -1)


@contextmanager
def packed_attention(model: Any, name: str = NAME) -> Iterator[None]:
    """Restrict a model's attention to the sequences of packed rows inside the block.

    The block must span backward passes too: gradient checkpointing runs the forward pass again.
    Blocks of several trainings on one base may end in any order.

    Args:
        model: transformers model, with or without adapters.
        name: name of the registered attention function.
    """
    configs = _configs(unwrapped(model))
    token = _inside.set(_inside.get() | {id(unwrapped(model))})
    for config in configs:
        _, usual, count = _open.get(id(config), (config, config._attn_implementation, 0))
        _open[id(config)] = (config, usual, count + 1)
        config._attn_implementation = name
    try:
        yield
    finally:
        _inside.reset(token)
        for config in configs:
            _, usual, count = _open.pop(id(config))
            if count > 1:
                _open[id(config)] = (config, usual, count - 1)
            else:
                config._attn_implementation = usual


_inside: ContextVar[frozenset[int]] = ContextVar("inside packed_attention", default=frozenset())
"""Ids of models inside `packed_attention`, per thread, so that work in another thread between training
steps, such as the profile of the next trial, is not affected."""
_open: dict[int, tuple[Any, str, int]] = {}
"""Id of a configuration -> (the configuration, its usual attention, number of open blocks)."""


def attends_packed(model: Any) -> bool:
    """Return whether a model is inside `packed_attention` in this thread."""
    return id(unwrapped(model)) in _inside.get()


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrapper or a custom tuner."""
    if isinstance(model, AdaptedModel):
        return model.base
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _configs(model: torch.nn.Module) -> list[Any]:
    """Return the configurations that a model's modules read their attention from."""
    found = [getattr(module, "config", None) for module in model.modules()]
    unique = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    return list(unique.values())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within each sequence, with the signature of transformers' interface.

    Args:
        module: the attention layer.
        query: queries, shape (1, H, N, D).
        key: keys, shape (1, H_kv, N, D); H_kv divides H.
        value: values, shape as `key`; D may differ.
        attention_mask: `boundary_mask` of the row; an ordinary mask or None for padded batches.
        dropout: dropout probability of attention weights.
        scaling: factor of the scores; none: 1 / sqrt(D).
        **others: of these, `sliding_window` and `softcap` are used.

    Returns:
        Outputs of shape (1, N, H, D), and None for the attention weights.

    Raises:
        NotPacked: the attention in a packed row is not causal, or has unsupported arguments.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return _padded(module, query, key, value, attention_mask, dropout, scaling, others)
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise NotPacked("attention that is not causal")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise NotPacked("packed attention takes one row without a cache")
    if any(others.get(name) is not None for name in _UNKNOWN):
        raise NotPacked(f"attention with {' or '.join(_UNKNOWN)}")
    window, softcap = others.get("sliding_window"), others.get("softcap")
    bounds = attention_mask.flatten()
    if query.is_cuda and query.dtype in _FLASH_TYPES and not dropout and softcap is None:
        return _varlen(query, key, value, bounds, scaling, window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    lengths = bounds.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        if softcap is None:
            reach = None if window is None or window >= q.shape[2] else _reach(q, k, window)
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=reach, dropout_p=dropout, is_causal=reach is None, scale=scaling
            )
        else:
            out = _capped(q, k, v, _reach(q, k, window), dropout, scaling, softcap)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


_FLASH_TYPES = (torch.bfloat16, torch.float16)
_UNKNOWN = ("s_aux", "position_bias", "cache")
"""Unsupported attention arguments of models: GPT-OSS's sinks, T5's biases, a paged cache."""


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute attention by torch's flash attention for packed rows."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = bounds.to(query.device, non_blocking=True), int(bounds.diff().max())
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    found = varlen_attn(
        q, k, v, ends, ends, longest, longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found.unsqueeze(0)


def _padded(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Compute attention in a padded batch as transformers does, which another trial may need in between."""
    softcap = others.get("softcap")
    if softcap is None:
        usual = AttentionInterface()["sdpa"]
        found, _ = usual(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)
        return found, None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if mask is None:
        mask = _reach(query, key)
    return _capped(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2), None


def _reach(query: torch.Tensor, key: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Return the mask of keys visible to each query: itself, and all or `window` - 1 positions before it."""
    n, m = query.shape[2], key.shape[2]
    ones = torch.ones(n, m, dtype=torch.bool, device=query.device)
    seen = ones.tril(m - n)
    return seen if window is None else seen & ones.triu(m - n + 1 - window)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Compute attention with scores limited to ±softcap by tanh, which torch's kernels do not support."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return functional.dropout(weights, dropout) @ v


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
