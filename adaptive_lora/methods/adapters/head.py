"""The head of a task inside an adapted model: identified, copied and restored.

PEFT trains a copy of each module of the head (`modules_to_save`) and saves it with the adapter;
custom tuners train the base's own module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

_COPY = ".modules_to_save.default"


def in_head(name: str, head: Iterable[str]) -> bool:
    """Return whether a tensor, by its name in the base, belongs to a head."""
    return any(name.startswith(f"{module}.") for module in head)


def head_problems(adapted: nn.Module, head: Sequence[str]) -> list[str]:
    """Return a sentence for every tensor of the head that is not trainable in float32."""
    found = _tensors(adapted, head)
    return [
        f"{name} of the head is not trainable in float32"
        for name, tensor in found.items()
        if not tensor.requires_grad or tensor.dtype != torch.float32
    ]


def read_head(adapted: nn.Module, head: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return a copy of the trained head's tensors."""
    return {name: p.detach().clone() for name, p in _tensors(adapted, head).items()}


def write_head(adapted: nn.Module, state: Mapping[str, torch.Tensor], head: Sequence[str]) -> None:
    """Copy tensors from `read_head` into a model with the same head."""
    with torch.no_grad():
        for name, tensor in _tensors(adapted, head).items():
            tensor.copy_(state[name])


def untrained_heads(adapted: Any) -> dict[str, nn.Module]:
    """Return name -> original of each head module that PEFT replaced by a copy; `unload` keeps the copies."""
    return {
        name: module.original_module
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _tensors(adapted: Any, head: Sequence[str]) -> dict[str, nn.Parameter]:
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    return {
        name.replace(_COPY, ""): parameter
        for name, parameter in base.named_parameters()
        if in_head(name, head) and ".original_module." not in name
    }
