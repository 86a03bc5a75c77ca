"""Adapters of several trials on one frozen base: one base product, and each trial's own A and B.

Each trial keeps the PEFT layers that it was attached with. For a pass over one trial's examples these
are placed into the base (`mount`), and the model is the one that the trial has alone; for a pass over
the examples of several trials a `GroupedSite` is placed there, with the A and B of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.dropout import SiteDropout, own_dropout
from adaptive_lora.training.joint.products import grouped_update, suits_groups

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
