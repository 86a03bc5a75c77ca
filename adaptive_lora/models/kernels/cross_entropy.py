"""Cross-entropy from hidden states, in chunks, so that the logits of all tokens are never in memory at once.

The gradient of the hidden states is computed in the forward pass, chunk by chunk, as in Liger
(arXiv:2410.10989, section 3.2), here with any frozen head on any device. Peak memory in addition to
the inputs is one chunk of logits.

Liger's own kernel is not used, on a GPU either: where tokens have different weights in the loss, as
when several trials train together with their own means, its backward pass runs through the head
again, and it does not support a factor of the logits (Cohere, Granite). A row's gradient, as stored
here, is right for every weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adaptive_lora.models.kernels.tiles import row_slices, tiled_nll


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Conversion of hidden states to logits: a linear layer, a factor and a limit."""

    module: nn.Module
    """Linear layer to the vocabulary, with or without bias, tied to the embedding or not."""
    scale: float = 1.0
    """Factor of the logits, as in Cohere and Granite."""
    softcap: float | None = None
    """Limit c of the logits, applied as c * tanh(logits / c), as in Gemma 2; None: no limit."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the head's vocabulary."""
        module: Any = self.module
        return int(getattr(module, "out_features", None) or len(module.weight))

    @property
    def plain(self) -> bool:
        """Mark of a linear layer with plain, not quantised, weights."""
        weight = getattr(self.module, "weight", None)
        floating = weight is not None and weight.is_floating_point()
        return type(self.module) is nn.Linear and floating

    @property
    def frozen(self) -> bool:
        """Mark of a plain linear layer without trainable parameters, which needs no gradient."""
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        return self.plain and not trained

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits in float32, shape (S, V), from hidden states of shape (S, d)."""
        return self.limited(self.module(hidden).float())

    def limited(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits from the linear layer's outputs: scaled and limited."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def token_nll(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood per token in nats, shape (S,), float32, with its gradient.

    Args:
        head: head of the model.
        hidden: last hidden states at the positions that predict supervised tokens, shape (S, d).
        targets: next tokens, shape (S,).
    """
    if head.frozen:
        nll: torch.Tensor = _FrozenHead.apply(hidden, head, targets)
        return nll
    parts = [
        checkpoint(_chunk_nll, head, hidden[rows], targets[rows], use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk_nll(head, hidden[rows], targets[rows])
        for rows in row_slices(head, hidden, narrow=False)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _chunk_nll(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head.logits(hidden), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Loss per token with a frozen head; each token's gradient is stored in the forward pass.

    A row's gradient is proportional to the later weight of its loss, so the gradient of the forward
    pass is right for every weighting.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        nll = tiled_nll(head, hidden, targets, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), None, None
