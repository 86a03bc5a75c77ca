"""Adapters of several trials on one frozen base: one base product, and each trial's own A and B.

Each trial keeps the PEFT layers that it was attached with. For a pass over one trial's examples these
are placed into the base (`mount`), and the model is the one that the trial has alone; for a pass over
the examples of several trials a `GroupedSite` is placed there, with the A and B of all of them.

A loop over the trials starts about fifteen small kernels per trial and site, which take a GPU longer
than the base's product. So all A of a site are stacked in one tensor where that is possible, and so
are all B, with lower ranks padded by zeros; torch's grouped product then multiplies each trial's rows
by its own matrix alone, so that NaN in one trial does not reach another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.dropout import SiteDropout, own_dropout
from adaptive_lora.models.kernels.products import compute_type

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEP = 8
"""Multiple to which ranks are padded: grouped products need rows of a multiple of 16 bytes."""

Layers = Mapping[str, LoraLinear]
"""Site name -> LoRA layer of one trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The rows of a joint batch that belong to one trial."""

    member: int
    """Index of the trial."""
    rows: int
    """Number of its rows; the trials' rows are contiguous and in order."""
    width: int
    """Number of columns of its own batch; the joint batch is padded to the widest."""


class Routing:
    """Assignment of rows to trials in the current joint pass; shared by all grouped sites."""

    def __init__(self) -> None:
        """Start without assignments."""
        self.shares: Sequence[Share] = ()


def grouping_problem(adapted: nn.Module) -> str | None:
    """Return why an adapted model cannot be trained together with others, or None.

    Only A and B of plain LoRA on linear layers may be trained. The base must have no dropout of its
    own: that draws from one global random stream, from which several trials at once cannot draw the
    numbers that each would draw alone.
    """
    layers = lora_layers(adapted)
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    if not layers:
        return "it has no LoRA layers"
    if any(p.requires_grad and id(p) not in own for p in adapted.parameters()):
        return "parameters outside the LoRA layers are trained"
    for name, layer in layers.items():
        if type(layer) is not LoraLinear or layer.lora_variant or set(layer.lora_A) != {ADAPTER}:
            return f"{name} is no plain LoRA layer"
        if layer.lora_B[ADAPTER].bias is not None:
            return f"{name} trains a bias"
    for name, module in adapted.named_modules():
        if (probability := max(own_dropout(module).values(), default=0.0)) > 0:
            return f"the base has dropout of its own ({name}: {probability:g}); --base-dropout false switches it off"
    return None


def take_off(adapted: Any) -> Layers:
    """Remove an adapted model's layers from its base and return them; `mount` restores them."""
    base, layers = adapted.get_base_model(), lora_layers(adapted)
    mount(base, {name: layer.get_base_layer() for name, layer in layers.items()})
    if hasattr(base, "peft_config"):  # otherwise PEFT treats the next trial as a second adapter
        del base.peft_config
    return layers


def mount(base: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Place modules into the base at the sites' names."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, module)


class GroupedSite(nn.Module):
    """A site of the base with the adapters of several trials, each for its own rows."""

    def __init__(self, base_layer: nn.Module, layers: Mapping[int, LoraLinear], routing: Routing):
        """Wrap a base layer.

        Args:
            base_layer: the frozen linear layer.
            layers: index of a trial -> its LoRA layer here; trials without this site are missing.
            routing: assignment of rows to trials.
        """
        super().__init__()
        self.base_layer = base_layer
        self.layers = nn.ModuleDict({str(member): layer for member, layer in layers.items()})
        self._routing = routing

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the base layer's output plus, in each trial's rows, its own scaled B A x."""
        result: torch.Tensor = self.base_layer(inputs)
        shares = self._routing.shares
        layers = [self.layers[key] if (key := str(s.member)) in self.layers else None for s in shares]
        total = sum(share.rows for share in shares)
        rows = inputs.reshape(total, -1, inputs.shape[-1])  # some models flatten rows and columns
        if suits_groups(layers, inputs):
            ends = accumulate(share.rows * rows.shape[1] for share in shares)
            update = grouped_update(layers, rows.flatten(0, 1), tuple(ends))
            return result + update.to(result.dtype).view_as(result)
        sizes = [share.rows for share in shares]
        parts = result.reshape(total, -1, result.shape[-1]).split(sizes)
        adapted = [
            part if layer is None else part + _update(layer, own, share.width).to(part.dtype)
            for layer, share, own, part in zip(layers, shares, rows.split(sizes), parts, strict=True)
        ]
        return torch.cat(adapted).view_as(result)


def _update(layer: Any, inputs: torch.Tensor, width: int) -> torch.Tensor:
    """Return scale * B A x as PEFT computes it.

    Dropout masks are drawn for the columns of the trial's own batch only.
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    inputs = inputs.to(a.weight.dtype)
    dropout, columns = layer.lora_dropout[ADAPTER], inputs.shape[1]
    if isinstance(dropout, SiteDropout) and width < columns:
        kept = dropout(inputs[:, :width])
        inputs = functional.pad(kept, (0, 0, 0, columns - width))  # padding needs no update
    else:
        inputs = dropout(inputs)
    update: torch.Tensor = b(a(inputs)) * layer.scaling[ADAPTER]
    return update


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
