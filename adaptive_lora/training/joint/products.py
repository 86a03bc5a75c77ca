"""The updates of several trials on a site in two grouped products, whatever their ranks.

A loop over the trials starts some fifteen small kernels a trial and site, which a GPU waits for
longer than for the base's product. Here all A of a site stand in one tensor, and so do all B, lower
ranks filled up with zeros; torch's grouped product then meets each trial's rows with its own matrix
alone, so that a trial that turns NaN stays by itself.
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
"""Ranks are filled up to a multiple: rows of a grouped product take multiples of 16 bytes."""


def suits_groups(layers: Sequence[Any | None], inputs: torch.Tensor) -> bool:
    """Return whether the update of these layers can be formed by grouped products.

    Args:
        layers: the LoRA layer of each trial, or None where it leaves the site out.
        inputs: of the site.
    """
    there = [layer for layer in layers if layer is not None]
    if not there or any(not isinstance(_dropout(layer), nn.Identity) for layer in there):
        return False
    dtype = compute_type(inputs, _a(there[0]))
    step = 128 // torch.finfo(dtype).bits  # numbers in 16 bytes
    widths = (inputs.shape[-1], len(_b(there[0])))
    return dtype in _TYPES and all(width % step == 0 for width in widths)


def grouped_update(layers: Sequence[Any | None], inputs: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Return scale * B A x of each trial's rows, (T, out) in the type that autocast or A has.

    Args:
        layers: the LoRA layer of each trial, or None where it leaves the site out.
        inputs: (T, in), the trials' rows one after another.
        ends: where the rows of each trial end.
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
    """Return (G, R, width) from one (r, width) for each of G ranks that is not 0."""
    first = matrices[0]
    rows = torch.cat([first.new_zeros(1, first.shape[1]), *matrices])
    found: torch.Tensor = rows.index_select(0, _places(ranks, first.device))
    return found.view(len(ranks), -1, first.shape[1])


@lru_cache(maxsize=256)
def _places(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return for each row of a stack its row among all, after one of zeros that is row 0."""
    height = -(-max(ranks) // _STEP) * _STEP
    places, start = [], 1
    for rank in ranks:
        places += [*range(start, start + rank), *[0] * (height - rank)]
        start += rank
    return torch.tensor(places, device=device)


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values on a device; kept, so that not every site waits for them to get there."""
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
