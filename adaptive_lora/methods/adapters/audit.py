"""Audits of an adapted model: it matches its plan, and training has changed it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.allocation import Plan, SiteRank, TunerPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.audit_tuner import audit_tuner, trained_tensors
from adaptive_lora.methods.adapters.head import head_problems, in_head


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
    layers, problems = lora_layers(adapted), []
    planned = {entry.site.name: entry for entry in plan.entries}
    for name in sorted(layers.keys() ^ planned.keys()):
        problems.append(f"{name} is {'not planned' if name in layers else 'not adapted'}")
    for name in layers.keys() & planned.keys():
        entry, layer = planned[name], layers[name]
        site, rank = entry.site, entry.rank
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        found = {
            "rank": (layer.r[ADAPTER], rank),
            "alpha": (layer.lora_alpha[ADAPTER], entry.alpha),
            "scale": (layer.scaling[ADAPTER], plan.scale_of(entry)),
            "shape of A": (tuple(a.shape), (rank, site.in_features)),
            "shape of B": (tuple(b.shape), (site.out_features, rank)),
            "shape of DoRA's magnitudes": (_magnitudes(layer), _planned_magnitudes(entry)),
            "base": (_base_of(layer), plan.base_of(entry)),
        }
        problems += [
            f"{name}: {what} is {built}, planned {wanted}"
            for what, (built, wanted) in found.items()
            if not _same(built, wanted)
        ]
    problems += head_problems(adapted, head)
    trainable = {n: p for n, p in trained_tensors(adapted).items() if not in_head(n, head)}
    problems += [f"{name} is trainable" for name in trainable if "lora_" not in name]
    total = sum(parameter.numel() for parameter in trainable.values())
    if total != plan.trainable_parameters:
        problems.append(f"{total:,} parameters are trainable, planned {plan.trainable_parameters:,}")
    if problems:
        raise AdapterError("the model differs from its plan: " + "; ".join(sorted(problems)))


def _base_of(layer: Any) -> str:
    """Return how the base weight of an adapter is stored."""
    state = getattr(layer.get_base_layer().weight, "quant_state", None)
    return BaseStorage.FULL if state is None else str(state.quant_type)


def _magnitudes(layer: Any) -> tuple[int, ...] | None:
    """Return the shape of a layer's magnitudes, or None for a layer without DoRA."""
    if not layer.use_dora[ADAPTER]:
        return None
    return tuple(layer.lora_magnitude_vector[ADAPTER].weight.shape)


def _planned_magnitudes(entry: SiteRank) -> tuple[int, ...] | None:
    return (entry.magnitudes,) if entry.dora else None


def _same(built: object, wanted: object) -> bool:
    if isinstance(built, float) or isinstance(wanted, float):
        return math.isclose(float(built), float(wanted), rel_tol=1e-12)  # type: ignore[arg-type]
    return built == wanted


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
    if still:
        raise AdapterError(
            f"training did not move B at {len(still)} sites ({', '.join(still[:4])}"
            f"{', ...' if len(still) > 4 else ''}): no gradient reached them."
        )
