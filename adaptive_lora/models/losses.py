"""The loss of all methods: cross-entropy from logits over supervised tokens.

A model's own `.loss` is never used, because AdaLoRA adds its orthogonality penalty to it, even in
evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.data import unpadded
from adaptive_lora.data.batches import IGNORED, Batch
from adaptive_lora.models.kernels import attends_packed, packed_nll
from adaptive_lora.serving import virtual_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """A model's predictions at the K positions where some example of a batch is supervised."""

    logits: torch.Tensor
    """Logits in float32, shape (B, K, V)."""
    targets: torch.Tensor
    """Next token, IGNORED where not supervised, shape (B, K)."""

    @property
    def supervised(self) -> torch.Tensor:
        """Mask of supervised predicted tokens, boolean, shape (B, K)."""
        return self.targets != IGNORED


def predict(model: Any, batch: Batch) -> Predictions:
    """Run a causal language model on a batch.

    Logits are computed only from the first position that predicts a supervised token of any
    example (`logits_to_keep`), which saves most of the head's work on long prompts.
    """
    labels = batch.labels[:, 1:]
    used = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    keep = torch.arange(int(used[0]), int(used[-1]) + 1, device=labels.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    places = keep + virtual_tokens(model)
    if _keeps_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
    else:
        logits = model(**inputs).logits[:, places]
    return Predictions(logits=logits.float(), targets=labels[:, keep])


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihoods in nats, shape (B, T), 0 where not supervised."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


Loss = Callable[[nn.Module, Batch], torch.Tensor]
"""Function from model and batch to the loss to minimise, summed over supervised tokens, in nats.

Examples of a batch must be independent, because profilers divide batches into halves by example.
"""


LossByExample = Callable[[nn.Module, Batch], torch.Tensor]
"""Function from model and batch to the loss of each example, shape (B,), with gradient."""


def causal_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood of a causal language model.

    Inside `packed_attention` the examples run as one row without padding, with the same sum.
    """
    if attends_packed(model):
        return packed_nll(model, unpadded(batch))[0].sum()
    found = predict(model, batch)
    return functional.cross_entropy(
        found.logits.flatten(0, 1), found.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def masked_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood of a masked language model at labelled positions.

    Labels are at the position of the token to predict, not at the one before it.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    supervised = batch.labels != IGNORED
    return functional.cross_entropy(logits[supervised].float(), batch.labels[supervised], reduction="sum")


def no_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run a model without an objective, for measurements of its activations alone; return 0."""
    model(**batch.inputs)
    return torch.zeros((), device=batch.labels.device)


def _keeps_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
