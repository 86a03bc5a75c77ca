"""Several trials' adapters on one frozen base: one base product, each trial's own A and B.

Each trial keeps the PEFT layers that it was attached with. For a pass over its own examples these
stand in the base (`mount`) and the model is the one that the trial has alone; for a pass over the
examples of several trials a `GroupedSite` stands there and uses the A and B of all of them.
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
    """The part of a joint batch that is one trial's."""

    member: int
    """Index of the trial."""
    rows: int
    """Its rows; the trials' rows follow each other."""
    width: int
    """Columns of its own batch; the joint batch is padded to the widest."""


class Routing:
    """Whose rows are whose in the joint pass that is under way; shared by all grouped sites."""

    def __init__(self) -> None:
        """Route nothing yet."""
        self.shares: Sequence[Share] = ()


def grouping_problem(adapted: nn.Module) -> str | None:
    """Return why an adapted model cannot be trained together with others, or None.

    What is trained has to be A and B of plain LoRA on linear maps, nothing else. The base has to
    be free of dropout of its own: it draws from one global stream, from which several trials at
    once cannot draw what each would alone.
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
    """Take an adapted model's layers off its base and return them; `mount` puts them back."""
    base, layers = adapted.get_base_model(), lora_layers(adapted)
    mount(base, {name: layer.get_base_layer() for name, layer in layers.items()})
    if hasattr(base, "peft_config"):  # or PEFT takes the next trial for a second adapter
        del base.peft_config
    return layers


def mount(base: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into the base at the sites' names."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, module)


class GroupedSite(nn.Module):
    """A site of the base with the adapters of several trials, each for its own rows."""

    def __init__(self, base_layer: nn.Module, layers: Mapping[int, LoraLinear], routing: Routing):
        """Wrap a base layer.

        Args:
            base_layer: the frozen linear map.
            layers: trial -> its LoRA layer here; trials that leave the site out are missing.
            routing: whose rows are whose.
        """
        super().__init__()
        self.base_layer = base_layer
        self.layers = nn.ModuleDict({str(member): layer for member, layer in layers.items()})
        self._routing = routing

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the base's product plus, in each trial's rows, its own scaled B A x."""
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

    Masks of dropout are drawn for the columns that the trial's own batch has.
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
