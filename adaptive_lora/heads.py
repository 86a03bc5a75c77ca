"""Heads: what a task trains beside adapters, because the base's checkpoint does not have it.

A head starts from the trial's seed, the same for every method, is trained and saved with the
adapter, and is counted apart from it: methods compare by their adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.errors import ModelError
from adaptive_lora.seeding import rng_for

_OUTSIDE_BLOCKS = ("pooler",)
"""Modules of a base that a checkpoint may lack: those that other training objectives do not use."""
_SPREAD = 0.02
"""Standard deviation of fresh weights where the configuration states none (BERT's, 1810.04805)."""


def find_head(model: Any, gaps: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that a task trains beside adapters: what stands on top of the base.

    Args:
        model: loaded for its task.
        gaps: weights that its checkpoint lacks; a pooler among them is trained too.
    """
    tops = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    poolers = {
        name.rpartition(".")[0]
        for name in gaps
        if not _within(name, tops) and any(part in name for part in _OUTSIDE_BLOCKS)
    }
    return (*sorted(poolers), *tops)


def require_complete(gaps: Sequence[str], head: Sequence[str]) -> None:
    """Check that a checkpoint lacks nothing but weights of the head.

    Raises:
        ModelError: it lacks others; they would be random.
    """
    lost = [name for name in gaps if not _within(name, head)]
    if lost:
        raise ModelError(
            f"the checkpoint lacks {len(lost)} weights of the base itself, such as {lost[0]}; "
            f"required all{' but those of ' + ', '.join(head) if head else ''}."
        )


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def start_head(model: nn.Module, gaps: Iterable[str], *, seed: int) -> None:
    """Give weights that the checkpoint lacks the seed's values, the same on every machine.

    Matrices are normal with the configuration's deviation, biases 0 and scales of norms 1.
    """
    spread = float(getattr(model.config, "initializer_range", None) or _SPREAD)
    for name in gaps:
        weight = model.get_parameter(name)
        if weight.ndim > 1:
            draws = rng_for(seed, "head", name).standard_normal(tuple(weight.shape), "float32")
            values = torch.from_numpy(draws * spread)
        else:
            values = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0)
        with torch.no_grad():
            weight.copy_(values)


def count_head(model: nn.Module, head: Iterable[str]) -> int:
    """Return the parameters of a head."""
    return sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
