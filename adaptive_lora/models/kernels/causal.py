"""A causal language model on a packed row: hidden states, then the head on supervised tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adaptive_lora.data import PackedBatch
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.models.kernels.attention import boundary_mask, unwrapped
from adaptive_lora.models.kernels.cross_entropy import Head, token_nll, token_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised:
    """The S positions of a packed row that predict a supervised token."""

    hidden: torch.Tensor
    """Last hidden states at these positions, shape (S, d), with gradient."""
    targets: torch.Tensor
    """Next tokens, shape (S,)."""
    owners: torch.Tensor
    """Index of the example of each position, shape (S,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedScores:
    """Scores of the S supervised tokens of a packed row."""

    nll: torch.Tensor
    """Negative log-likelihood in nats, shape (S,)."""
    correct: torch.Tensor
    """Hits of the most likely token, boolean, shape (S,)."""
    owners: torch.Tensor
    """Index of the example of each position, shape (S,)."""


def supervised(model: Any, batch: PackedBatch) -> Supervised:
    """Run a model without its head on a packed row, inside `packed_attention`."""
    body = unwrapped(model).base_model
    hidden = body(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=boundary_mask(batch.boundaries),
        use_cache=False,
    ).last_hidden_state[0]
    at = (batch.targets != IGNORED).nonzero().squeeze(1)
    return Supervised(hidden=hidden[at], targets=batch.targets[at], owners=batch.owners[at])


def packed_nll(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood per supervised token, with gradient, and the token's example.

    Both have shape (S,), in the order of the row; the second is the index of the example.
    """
    found = supervised(model, batch)
    return token_nll(head_of(model), found.hidden, found.targets), found.owners


@torch.no_grad()
def packed_scores(model: Any, batch: PackedBatch) -> PackedScores:
    """Score the supervised tokens of a packed row without gradient."""
    found = supervised(model, batch)
    nll, correct = token_scores(head_of(model), found.hidden, found.targets)
    return PackedScores(nll=nll, correct=correct, owners=found.owners)


def head_of(model: Any) -> Head:
    """Return the head of a causal language model, with the scale and limit of logits in its configuration."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    divided = getattr(config, "logits_scaling", None)  # Granite
    scale = 1 / divided if divided else getattr(config, "logit_scale", None) or 1.0  # Cohere
    return Head(
        module=inner.get_output_embeddings(),
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
    )
