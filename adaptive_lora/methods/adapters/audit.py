"""Audits of an adapted model: it matches its plan, and training has changed it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.allocation import Plan, RankPlan, TunerPlan
from adaptive_lora.allocation.architecture import Shape
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adapters.attach import ADAPTER, head_tensors, in_head, lora_layers

_WRAPPERS = re.compile(r"^(base_model\.model\.|base\.)")
_MOST_PROBLEMS = 20
"""Number of differences listed for tuners, whose plans can name thousands of tensors."""


def trained_tensors(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return name in the base -> trainable tensor; prefixes and suffixes added by wrappers are removed."""
    return {
        _WRAPPERS.sub("", name): parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad
    }


def head_problems(adapted: nn.Module, head: Sequence[str]) -> list[str]:
    """Return a sentence for every tensor of the task's head that is not trainable in float32."""
    return [
        f"{name} of the head is not trainable in float32"
        for name, tensor in head_tensors(adapted, head).items()
        if not tensor.requires_grad or tensor.dtype != torch.float32
    ]


def audit_as_built(adapted: nn.Module, plan: Plan, head: Sequence[str] = ()) -> None:
    """Compare every rank, alpha, scale and shape in the model with the plan.

    For tuners without ranks, names and shapes of trainable tensors are compared.

    The published code this project starts from applied only the first of its per-layer
    configurations, so its three "adaptive" arms were three uniform ones.

    Args:
        adapted: adapted model.
        plan: plan to compare with.
        head: modules trained in addition to the plan; everything else must be frozen.

    Raises:
        AdapterError: there are differences, or other trainable parameters; the message lists all of them.
    """
    if isinstance(plan, TunerPlan):
        audit_tuner(adapted, plan.tensors if plan.kept is None else plan.kept, head)
        return
    plan = plan.built
    problems = [*_site_problems(adapted, plan), *head_problems(adapted, head)]
    trainable = {n: p for n, p in trained_tensors(adapted).items() if not in_head(n, head)}
    problems += [f"{name} is trainable" for name in trainable if "lora_" not in name]
    total = sum(parameter.numel() for parameter in trainable.values())
    if total != plan.trainable_parameters:
        problems.append(f"{total:,} parameters are trainable, planned {plan.trainable_parameters:,}")
    if problems:
        raise AdapterError("the model differs from its plan: " + "; ".join(sorted(problems)))


def _site_problems(adapted: nn.Module, plan: RankPlan) -> list[str]:
    """Return a sentence for every difference between a LoRA layer and its site's entry."""
    layers, planned = lora_layers(adapted), {entry.site.name: entry for entry in plan.entries}
    problems = [
        f"{name} is {'not planned' if name in layers else 'not adapted'}" for name in layers.keys() ^ planned.keys()
    ]
    for name in layers.keys() & planned.keys():
        entry, layer = planned[name], layers[name]
        site, rank, dora = entry.site, entry.rank, layer.use_dora[ADAPTER]
        found = {
            "rank": (layer.r[ADAPTER], rank),
            "alpha": (layer.lora_alpha[ADAPTER], entry.alpha),
            "scale": (layer.scaling[ADAPTER], plan.scale_of(entry)),
            "shape of A": (tuple(layer.lora_A[ADAPTER].weight.shape), (rank * site.matrices, site.in_features)),
            "shape of B": (tuple(layer.lora_B[ADAPTER].weight.shape), (site.out_features, rank * site.matrices)),
            "shape of DoRA's magnitudes": (
                tuple(layer.lora_magnitude_vector[ADAPTER].weight.shape) if dora else None,
                (entry.magnitudes,) if entry.dora else None,
            ),
            "base": (_storage(layer.get_base_layer()), plan.base_of(entry)),
        }
        problems += [
            f"{name}: {what} is {built}, planned {wanted}"
            for what, (built, wanted) in found.items()
            if not _same(built, wanted)
        ]
    return problems


def _storage(layer: nn.Module) -> str:
    packed = getattr(layer, "quant_state", None)  # of the weight itself FSDP2 keeps the bytes alone
    return BaseStorage.FULL if packed is None else str(packed.quant_type)


def as_stored(plan: RankPlan, base: nn.Module) -> RankPlan:
    """Return a plan for a base that may be loaded in 4 bit already, with the storage of its layers."""
    layers = [entry.site.name for entry in plan.entries if not entry.site.experts]
    kinds = {name: _storage(base.get_submodule(name)) for name in layers}
    packed = sorted(set(kinds.values()) - {BaseStorage.FULL})
    return dataclasses.replace(plan, base=packed[0]) if packed else plan


def _same(built: Any, wanted: Any) -> bool:
    if isinstance(built, float) or isinstance(wanted, float):
        return math.isclose(built, wanted, rel_tol=1e-12)
    return bool(built == wanted)


def audit_tuner(adapted: nn.Module, tensors: Mapping[str, Shape], head: Sequence[str] = ()) -> None:
    """Compare names, shapes and types of all trainable tensors with the plan.

    Raises:
        AdapterError: there are differences; the message lists them.
    """
    found, problems = trained_tensors(adapted), head_problems(adapted, head)
    for name in found.keys() ^ tensors.keys():
        if name in found and in_head(name, head):
            continue  # trained in addition to the plan
        problems.append(f"{name} is {'not planned' if name in found else 'not trainable'}")
    for name in found.keys() & tensors.keys():
        if tuple(found[name].shape) != tuple(tensors[name]):
            problems.append(f"{name}: shape is {tuple(found[name].shape)}, planned {tuple(tensors[name])}")
        if found[name].dtype != torch.float32:
            problems.append(f"{name}: type is {found[name].dtype}, required torch.float32")
    if problems:
        shown, left = sorted(problems)[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS
        more = f" and {left} more" if left > 0 else ""
        raise AdapterError("the model differs from its plan: " + "; ".join(shown) + more)


def audit_moved(adapted: nn.Module, start: Mapping[str, torch.Tensor] | None = None) -> None:
    """Check that training changed the update of every site.

    Args:
        adapted: trained model.
        start: site name -> B before training, where that was not zero.

    Raises:
        AdapterError: sites did not change (no gradient, or a rate of zero); the message names them.
    """
    still = [
        name
        for name, layer in lora_layers(adapted).items()
        if not bool(torch.any(layer.lora_A[ADAPTER].weight != 0))
        or torch.equal(b := layer.lora_B[ADAPTER].weight, torch.zeros_like(b) if start is None else start[name].to(b))
    ]
    _refuse_unmoved(still, f"B at {len(still)} sites")


def audit_tuner_moved(
    adapted: nn.Module, start: Mapping[str, torch.Tensor], must_move: Callable[[str], bool] = lambda name: False
) -> int:
    """Check that training changed the tensors; return the number of unchanged ones.

    Some may be unchanged: weights without gradient, such as an unused pooler.

    Args:
        adapted: trained model.
        start: name -> tensor before training.
        must_move: function from a tensor's name to whether it must change.

    Raises:
        AdapterError: no tensor changed, or one that must change did not.
    """
    now = trained_tensors(adapted)
    still = [name for name, before in start.items() if torch.equal(before.to(now[name]), now[name].detach())]
    stuck = [name for name in still if must_move(name)] or (still if len(still) == len(start) else [])
    _refuse_unmoved(stuck, f"{len(stuck)} tensors")
    return len(still)


def _refuse_unmoved(names: Sequence[str], what: str) -> None:
    if names:
        more = ", ..." if len(names) > 4 else ""
        raise AdapterError(f"training did not move {what} ({', '.join(names[:4])}{more}): no gradient reached them.")
