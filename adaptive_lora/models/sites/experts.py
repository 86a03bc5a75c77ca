"""Mixtures of experts: stacks of routed experts' weights that PEFT adapts, routers, and what is frozen.

transformers 5 stores the weights of a layer's routed experts as 3-D parameters, (experts, out, in) or, where the module
says `is_transposed`, (experts, in, out). PEFT's `target_parameters` adapts these, and reads the same mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_EXPERTS = re.compile(r"(^|\.)experts?(_\d+)?(\.|$)")
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
ROUTER = "it routes tokens to experts, and stays frozen"
ROUTED = "it is a routed expert, and stays frozen"
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
"""Names of settings that give the number of experts that a token runs through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Weights of the routed experts of one layer, stacked in a 3-D parameter as PEFT reads it."""

    name: str
    """Full name of the parameter."""
    experts: int
    in_features: int
    out_features: int


def expert_modules(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules of routed experts; empty for a dense model."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_experts = _EXPERTS.search(name) or type(module).__name__.endswith("Experts")
        if is_experts and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found


def frozen_part(name: str, experts: Iterable[str]) -> str | None:
    """Return why a linear layer of a mixture of experts stays frozen, or None for attention and shared experts.

    Args:
        name: full module name of the layer.
        experts: names of the modules of routed experts; empty for a dense model.
    """
    experts = tuple(experts)
    if experts and _ROUTERS.search(name):
        return ROUTER
    return ROUTED if name.startswith(tuple(f"{module}." for module in experts)) else None


def stacks(model: nn.Module) -> Iterator[Stack]:
    """Yield the stacks of routed experts that PEFT adapts, in module order.

    Modules that do not follow transformers' interface of experts (Llama 4, JetMoe) are left out: PEFT cannot know
    which axis of their weights is the input.
    """
    modules = dict(model.named_modules())
    for module_name in expert_modules(model):
        module: Any = modules[module_name]
        experts = getattr(module, "num_experts", None)
        if getattr(module, "is_transposed", None) is None or not isinstance(experts, int) or experts < 2:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] == experts and parameter.is_floating_point():
                first, second = int(parameter.shape[1]), int(parameter.shape[2])
                sides = (first, second) if module.is_transposed else (second, first)
                yield Stack(name=f"{module_name}.{name}", experts=experts, in_features=sides[0], out_features=sides[1])


def active_experts(model: nn.Module) -> int | None:
    """Return the number of routed experts that a token runs through; None where the configuration has none."""
    settings: Any = getattr(model, "config", None)
    settings = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    given = (getattr(settings, name, None) for name in _ACTIVE)
    return next((value for value in given if isinstance(value, int) and value > 0), None)


def note_on_experts(model: nn.Module, adaptable: bool) -> str:
    """Return sentences on what is frozen in a mixture of experts; empty for a dense model.

    Args:
        model: model with or without weights.
        adaptable: whether routed experts can take adapters.
    """
    names = expert_modules(model)
    if not names:
        return ""
    held = tuple(f"{name}." for name in names)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if name.startswith(held))
    in_routers = sum(
        p.numel() for name, p in model.named_parameters() if _ROUTERS.search(name) and not name.startswith(held)
    )
    layers = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    routed, routers = f"the routed experts of {layers} ({in_experts:,} parameters)", f"routers ({in_routers:,})"
    if adaptable:
        return f"mixture of experts: {routed} stay frozen unless a method has experts=true; {routers} always do."
    kind = type(model.get_submodule(names[0])).__name__
    return (
        f"mixture of experts: {routed} and their {routers} stay frozen; PEFT cannot adapt {kind}, whose weights do not "
        "follow transformers' interface of experts."
    )
