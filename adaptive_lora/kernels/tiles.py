"""Scores of tokens, tile by tile of the vocabulary: for CPUs, whose caches hold a tile but no row.

Reading the head's weight again for every few rows costs a CPU as much as multiplying by it. Here a
tile of the weight meets many rows, and the sum of exponentials is kept beside the largest logit so
far (Milakov and Gimelshein, "Online normalizer calculation for softmax", 1805.02867, section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from adaptive_lora.kernels.cross_entropy import Head

ROWS, TILE = 1024, 1024
"""Hidden states and words of a tile: 4 MiB of logits in float32."""


def suits_tiles(head: Head, hidden: torch.Tensor) -> bool:
    """Return whether tiles are the faster way: on a CPU, with a plain linear map for a head."""
    return hidden.device.type == "cpu" and head.plain


@torch.no_grad()
def tiled_scores(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (nll (S,), whether the most likely token is the right one (S,)), without gradient.

    Args:
        head: a plain one.
        hidden: (S, d) last hidden states at the positions that predict supervised tokens.
        targets: (S,) the tokens that follow.
    """
    parts = [
        _scores(head, states, words)
        for states, words in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    ]
    nll, best = (torch.cat(found) for found in zip(*parts, strict=True))
    return nll, best == targets


def _scores(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood, and the most likely token where that may be the target.

    Elsewhere the token is -1: to find it would take longer than all the rest.
    """
    module: Any = head.module
    highest = torch.full((len(targets),), torch.finfo(torch.float32).min)
    total, right = torch.zeros_like(highest), torch.zeros_like(highest)
    best = torch.full_like(targets, -1)
    for start in range(0, len(module.weight), TILE):
        words = slice(start, start + TILE)
        bias = None if module.bias is None else module.bias[words]
        logits = head.limited(functional.linear(hidden, module.weight[words], bias).float())
        top = logits.amax(dim=-1)
        rising = top > highest
        best[rising] = -1
        own = ((targets >= start) & (targets < start + TILE)).nonzero().squeeze(1)
        right[own] = logits[own, targets[own] - start]
        hits = own[(rising & (right == top))[own]]
        best[hits] = logits[hits].argmax(dim=-1) + start  # of equals the first, as argmax has it
        top = torch.maximum(top, highest)
        total = total * (highest - top).exp() + logits.sub_(top[:, None]).exp_().sum(dim=-1)
        highest = top
    return total.log() + highest - right, best
