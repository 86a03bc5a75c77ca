"""One loss for all methods: cross-entropy from logits over supervised tokens.

Never a model's own `.loss`: AdaLoRA adds its orthogonality penalty to it, even in evaluation.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from adaptive_lora.data.batches import IGNORED, Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Scores of a batch at the K positions that predict a supervised token in some example."""

    nll: torch.Tensor
    """(B, K) negative log-likelihood in nats; 0 where not supervised. Carries the gradient."""
    supervised: torch.Tensor
    """(B, K) whether the predicted token counts."""
    correct: torch.Tensor
    """(B, K) whether the most likely token is the right one and counts."""


def token_scores(model: Any, batch: Batch) -> TokenScores:
    """Run a causal language model and score the supervised tokens.

    Logits are computed only from the first position that predicts a supervised token of any
    example (`logits_to_keep`), which spares most of the head's work on long prompts.
    """
    labels = batch.labels[:, 1:]
    used = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    keep = torch.arange(int(used[0]), int(used[-1]) + 1, device=labels.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if _keeps_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits = model(**inputs).logits[:, keep]
    targets = labels[:, keep]
    supervised = targets != IGNORED
    nll = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    correct = (logits.detach().argmax(dim=-1) == targets) & supervised
    return TokenScores(nll=nll, supervised=supervised, correct=correct)


def _keeps_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
