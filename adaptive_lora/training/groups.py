"""Optimiser parameter groups: separate learning rates for sites with a multiplier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers


def parameter_groups(
    model: nn.Module, multipliers: Mapping[str, float], lr: float, *, lora_plus: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups, one per learning rate.

    Without multipliers there is one group, in the model's order. A schedule scales every group
    from its own peak rate. AdamW multiplies weight decay by the rate, so it is scaled too.

    Args:
        model: adapted model.
        multipliers: site name -> factor of its rate; other sites have 1.
        lr: peak learning rate.
        lora_plus: additional factor of every B (LoRA+, 2402.12354).
    """
    factor_of: dict[int, float] = {}
    for name, layer in lora_layers(model).items() if multipliers or lora_plus != 1 else ():
        factor = multipliers.get(name, 1.0)
        factor_of |= {id(parameter): factor for parameter in layer.parameters()}
        if lora_plus != 1:
            factor_of[id(layer.lora_B[ADAPTER].weight)] = factor * lora_plus
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * factor} for factor, members in groups.items()]
