"""Check whether a model can run prompts of different lengths in one batch, padded on the left."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from .greedy import without_own_settings

_SHORT, _LONG = 3, 9
"""Number of tokens of the test prompt, and of the padded row."""
_WITHIN = {"float64": 1e-6, "float32": 1e-3}
"""Type of weights -> maximum difference in logits, relative to the largest."""
_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Base -> result of `pads_left`."""


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
