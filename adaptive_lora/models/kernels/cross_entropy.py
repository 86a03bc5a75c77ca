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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adaptive_lora.models.kernels.products import product

ROWS, TILE = 2048, 1024
"""Number of hidden states and of tokens in a tile on a CPU: 8 MiB of logits in float32."""
LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Device -> number of logits of a tile that is as wide as the vocabulary."""


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


@torch.no_grad()
def tiled_nll(head: Head, hidden: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the negative log-likelihood per token in nats, shape (S,), float32.

    Args:
        head: a frozen head.
        hidden: last hidden states at the positions that predict supervised tokens, shape (S, d).
        targets: next tokens, shape (S,).
        gradient: output for the gradient of each token's loss by its hidden state, shape (S, d), or None.
    """
    nll = torch.empty(len(targets), device=hidden.device)
    for rows in row_slices(head, hidden, narrow=_narrow(head, hidden)):
        into = None if gradient is None else gradient[rows]
        nll[rows] = _learn(head, hidden[rows], targets[rows], into)
    return nll


@torch.no_grad()
def token_scores(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, without gradient, nll and whether the most likely token is the target, each of shape (S,)."""
    nll = torch.empty(len(targets), device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for rows in row_slices(head, hidden, narrow=_narrow(head, hidden)):
        nll[rows], best = _score(head, hidden[rows], targets[rows])
        correct[rows] = best == targets[rows]
    return nll, correct


def row_slices(head: Head, hidden: torch.Tensor, *, narrow: bool) -> Iterator[slice]:
    """Yield slices over the rows of hidden states, about equal in size.

    Args:
        head: head that they are passed to.
        hidden: hidden states, shape (S, d).
        narrow: whether the tiles are narrower than the vocabulary.
    """
    whole = LOGITS.get(hidden.device.type, LOGITS["cpu"]) // head.vocabulary
    most = ROWS if narrow else max(16, whole)
    rows = len(hidden)
    size = -(-rows // max(1, -(-rows // most)))
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


def _narrow(head: Head, hidden: torch.Tensor) -> bool:
    return hidden.device.type == "cpu" and head.plain


def _tiles(head: Head, hidden: torch.Tensor) -> Iterator[slice]:
    """Yield slices over the vocabulary."""
    width = TILE if _narrow(head, hidden) else head.vocabulary
    for start in range(0, head.vocabulary, width):
        yield slice(start, min(start + width, head.vocabulary))


def _logits(head: Head, hidden: torch.Tensor, words: slice) -> torch.Tensor:
    """Return a tile's logits in float32."""
    if not head.plain:
        return head.logits(hidden)
    module: Any = head.module
    bias = None if module.bias is None else module.bias[words]
    found = product(hidden.to(module.weight.dtype), module.weight[words], bias)
    return head.limited(found.float())


class _Softmax:
    """Largest logit, sum of exponentials relative to it, and the target's logit, over the tiles so far.

    All have shape (S,).
    """

    def __init__(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        self.tiles = list(_tiles(head, hidden))
        self.highest = torch.full_like(targets, torch.finfo(torch.float32).min, dtype=torch.float32)
        self.total, self.right = torch.zeros_like(self.highest), torch.zeros_like(self.highest)
        self._owners = _owners(targets, self.tiles)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the token slice of each tile, and the rows whose target is in it."""
        return zip(self.tiles, self._owners, strict=True)

    def see(self, logits: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a tile; return its exponentials (computed in place) and the factor of the earlier ones."""
        top = torch.maximum(top, self.highest)
        fading = (self.highest - top).exp_()
        shares = logits.sub_(top[:, None]).exp_()
        self.total = self.total.mul_(fading).add_(shares.sum(dim=-1))
        self.highest = top
        return shares, fading

    @property
    def nll(self) -> torch.Tensor:
        return self.total.log() + self.highest - self.right


def _owners(targets: torch.Tensor, tiles: Sequence[slice]) -> Sequence[torch.Tensor]:
    """Return for each tile the rows whose target is in it."""
    if len(tiles) == 1:
        return [torch.arange(len(targets), device=targets.device)]
    words, rows = targets.sort()
    starts = torch.tensor([tile.start for tile in tiles[1:]], device=targets.device)
    return rows.tensor_split(torch.searchsorted(words, starts).cpu())


def _learn(head: Head, hidden: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the loss of some tokens; write each token's gradient if `gradient` is given."""
    weight: Any = head.module.weight
    softmax = _Softmax(head, hidden, targets)
    sums = torch.zeros_like(hidden, dtype=torch.float32)
    at_target = torch.ones_like(softmax.total)
    for words, own in softmax:
        logits = _logits(head, hidden, words)
        at = targets[own] - words.start
        softmax.right[own] = logits[own, at]
        slope = None
        if head.softcap is not None and gradient is not None:
            slope = 1 - (logits / head.softcap) ** 2
            at_target[own] = slope[own, at]
        shares, fading = softmax.see(logits, logits.amax(dim=-1))
        if gradient is not None:
            if slope is not None:
                shares *= slope
            sums.mul_(fading[:, None]).add_(product(shares.to(weight.dtype), weight[words].t()))
    if gradient is not None:
        # softmax - one-hot, times the weight: the division comes last, on few numbers.
        sums /= softmax.total[:, None]
        sums -= weight[targets].float() * at_target[:, None]
        gradient.copy_(sums.mul_(head.scale))
    return softmax.nll


def _score(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood, and the most likely token where it may be the target.

    Elsewhere the token is -1, because finding it would take longer than everything else.
    """
    softmax = _Softmax(head, hidden, targets)
    best = torch.full_like(targets, -1)
    for words, own in softmax:
        logits = _logits(head, hidden, words)
        top = logits.amax(dim=-1)
        rising = top > softmax.highest
        best[rising] = -1
        softmax.right[own] = logits[own, targets[own] - words.start]
        hits = own[(rising & (softmax.right == top))[own]]
        best[hits] = logits[hits].argmax(dim=-1) + words.start  # the first of equals, as argmax
        softmax.see(logits, top)
    return softmax.nll, best
