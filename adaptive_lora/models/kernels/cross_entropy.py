"""Cross-entropy from hidden states, in chunks: tokens x vocabulary never stands whole in memory.

The gradient for the hidden states is formed in the forward pass, chunk by chunk, as Liger does
(arXiv:2410.10989, section 3.2), here with any frozen head on any device. Peak memory beside the
inputs is one chunk of logits.

Liger's own kernel does not serve here, on a GPU either: where each token's loss has a weight of its
own, as where several trials train together and each has its mean, its backward pass runs through
the head once more, and it knows no factor of the logits (Cohere, Granite). A row's gradient, as
kept here, is right for every weight.
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
    """What turns hidden states into logits: a linear map, a factor and a limit."""

    module: nn.Module
    """Linear map to the vocabulary, with or without bias, tied to the embedding or not."""
    scale: float = 1.0
    """Factor of the logits, as in Cohere and Granite."""
    softcap: float | None = None
    """Logits are c * tanh(logits / c), as in Gemma 2; None: no limit."""

    @property
    def vocabulary(self) -> int:
        """Words that the head tells apart."""
        module: Any = self.module
        return int(getattr(module, "out_features", None) or len(module.weight))

    @property
    def plain(self) -> bool:
        """Whether this is a linear map whose weights are numbers of their own."""
        weight = getattr(self.module, "weight", None)
        floating = weight is not None and weight.is_floating_point()
        return type(self.module) is nn.Linear and floating

    @property
    def frozen(self) -> bool:
        """Whether this is a plain linear map with nothing to train: its gradient is not needed."""
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        return self.plain and not trained

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits in float32, (S, V) from (S, d)."""
        return self.limited(self.module(hidden).float())

    def limited(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits from the linear map's outputs: multiplied, and within the limit."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def token_nll(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood per token, (S,) in nats and float32, with its gradient.

    Args:
        head: of the model.
        hidden: (S, d) last hidden states at the positions that predict supervised tokens.
        targets: (S,) the tokens that follow.
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
    """Loss per token of a frozen head, with the gradient of each token's loss kept instead.

    A row's gradient is proportional to what its loss is multiplied with later, so forming it in the
    forward pass serves every weighting.
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
