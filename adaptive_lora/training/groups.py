"""Optimiser parameter groups: a learning rate of its own for sites whose plan asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adaptive_lora.adapters.attach import lora_layers


def parameter_groups(
    model: nn.Module, multipliers: Mapping[str, float], lr: float
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one learning rate each.

    Without multipliers there is one group, in the model's order. A schedule scales every group
    from its own peak rate.

    Args:
        model: adapted model.
        multipliers: site name -> factor of its rate; sites not named have 1.
        lr: peak learning rate.
    """
    factor_of = {
        id(parameter): factor
        for name, layer in (lora_layers(model).items() if multipliers else ())
        if (factor := multipliers.get(name)) is not None
        for parameter in layer.parameters()
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * factor} for factor, members in groups.items()]
