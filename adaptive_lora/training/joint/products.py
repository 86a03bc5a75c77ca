"""The updates of several trials at a site by two grouped products, for any ranks.

A loop over the trials starts about fifteen small kernels per trial and site, which take a GPU longer
than the base's product. Here all A of a site are stacked in one tensor, and so are all B, with lower
ranks padded by zeros; torch's grouped product then multiplies each trial's rows by its own matrix
alone, so that NaN in one trial does not reach another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.methods.adapters.attach import ADAPTER
from adaptive_lora.models.kernels.products import compute_type

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEP = 8
"""Multiple to which ranks are padded: grouped products need rows of a multiple of 16 bytes."""


def suits_groups(layers: Sequence[Any | None], inputs: torch.Tensor) -> bool:
    """Return whether the update of these layers can be computed by grouped products.

    Args:
        layers: LoRA layer of each trial, or None where the trial does not adapt the site.
        inputs: inputs of the site.
    """
    there = [layer for layer in layers if layer is not None]
    if not there or any(not isinstance(_dropout(layer), nn.Identity) for layer in there):
        return False
    dtype = compute_type(inputs, _a(there[0]))
    step = 128 // torch.finfo(dtype).bits  # numbers in 16 bytes
    widths = (inputs.shape[-1], len(_b(there[0])))
    return dtype in _TYPES and all(width % step == 0 for width in widths)


def grouped_update(layers: Sequence[Any | None], inputs: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Return scale * B A x of each trial's rows, shape (T, out), in autocast's or A's type.

    Args:
        layers: LoRA layer of each trial, or None where the trial does not adapt the site.
        inputs: rows of all trials, concatenated, shape (T, in).
        ends: index at which the rows of each trial end.
    """
    there = [layer for layer in layers if layer is not None]
    dtype, device = compute_type(inputs, _a(there[0])), inputs.device
    ranks = tuple(0 if layer is None else len(_a(layer)) for layer in layers)
    factors = tuple(0.0 if layer is None else layer.scaling[ADAPTER] for layer in layers)
    a = _stacked([_a(layer) for layer in there], ranks)
    b = _stacked([_b(layer).t() for layer in there], ranks)
    b = b * _constants(factors, b.dtype, device)[:, None, None]
    offsets = _constants(ends, torch.int32, device)
    low = functional.grouped_mm(inputs.to(dtype), a.to(dtype).transpose(1, 2), offs=offsets)
    return functional.grouped_mm(low, b.to(dtype), offs=offsets)


def _stacked(matrices: Sequence[torch.Tensor], ranks: tuple[int, ...]) -> torch.Tensor:
    """Stack matrices of shape (r, width), one per non-zero rank, to shape (G, R, width)."""
    first = matrices[0]
    rows = torch.cat([first.new_zeros(1, first.shape[1]), *matrices])
    found: torch.Tensor = rows.index_select(0, _places(ranks, first.device))
    return found.view(len(ranks), -1, first.shape[1])


@lru_cache(maxsize=256)
def _places(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return for each row of a stack its index among the concatenated rows, whose row 0 is zeros."""
    height = -(-max(ranks) // _STEP) * _STEP
    places, start = [], 1
    for rank in ranks:
        places += [*range(start, start + rank), *[0] * (height - rank)]
        start += rank
    return torch.tensor(places, device=device)


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values as a tensor on a device; cached, so that sites do not wait for the copy."""
    return torch.tensor(values, dtype=dtype, device=device)


def _a(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.lora_A[ADAPTER].weight
    return weight


def _b(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.lora_B[ADAPTER].weight
    return weight


def _dropout(layer: Any) -> nn.Module:
    module: nn.Module = layer.lora_dropout[ADAPTER]
    return module
