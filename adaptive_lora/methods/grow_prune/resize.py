"""Changes of a LoRA layer's rank during training; remaining components keep weights and Adam's moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptive_lora.methods.adapters.attach import ADAPTER


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRank:
    """New rank of a layer: remaining and new components, and scale."""

    kept: Sequence[int]
    """Indices of the remaining components, in order."""
    new_a: torch.Tensor
    """A of the k new components, shape (k, in); their B is zero, so the function does not change."""
    alpha: float
    scale: float
    """Factor of the update at the new rank; B is rescaled if it changes."""


def resize(layer: Any, change: NewRank, optimizer: torch.optim.Optimizer) -> None:
    """Replace A and B of a LoRA layer, in the model and in the optimiser.

    Args:
        layer: PEFT's LoRA layer.
        change: the new rank.
        optimizer: AdamW optimiser of A and B.
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    kept = torch.tensor(change.kept, dtype=torch.long, device=a.weight.device)
    added, factor = len(change.new_a), layer.scaling[ADAPTER] / change.scale
    new_a = change.new_a.to(a.weight)

    def of_a(old: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[kept], fill])

    def of_b(old: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[:, kept], fill], dim=1)

    def mean_a(old: torch.Tensor) -> torch.Tensor:
        return old[kept].mean(dim=0, keepdim=True).expand(added, -1)

    def mean_b(old: torch.Tensor) -> torch.Tensor:
        return old[:, kept].mean(dim=1, keepdim=True).expand(-1, added)

    zero_b = b.weight.new_zeros(len(b.weight), added)
    _replace(a, of_a(a.weight.detach(), new_a), optimizer, _Moments(of_a, mean_a, 1.0))
    _replace(b, of_b(b.weight.detach() * factor, zero_b), optimizer, _Moments(of_b, mean_b, factor))
    rank = len(change.kept) + added
    a.out_features = b.in_features = layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = change.alpha, change.scale


@dataclass(frozen=True, slots=True)
class _Moments:
    """Adaptation of Adam's moments to a resized weight.

    New components start without momentum and with the mean second moment of the remaining ones: with
    zero, Adam, whose bias correction has ended, would take steps of about three times the rate.
    """

    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    mean: Callable[[torch.Tensor], torch.Tensor]
    factor: float
    """Factor by which the weight was multiplied; its gradients are divided by it."""

    def carry(self, state: dict[str, Any]) -> dict[str, Any]:
        first, second = state["exp_avg"] / self.factor, state["exp_avg_sq"] / self.factor**2
        fill = self.mean(second)
        return {
            "step": state["step"].clone(),
            "exp_avg": self.join(first, torch.zeros_like(fill)),
            "exp_avg_sq": self.join(second, fill),
        }


def _replace(linear: nn.Linear, weight: torch.Tensor, optimizer: torch.optim.Optimizer, moments: _Moments) -> None:
    old, new = linear.weight, nn.Parameter(weight.contiguous())
    linear.weight = new
    for group in optimizer.param_groups:
        group["params"] = [new if member is old else member for member in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = moments.carry(state)
