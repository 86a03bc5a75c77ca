"""AdaLoRA layers of PEFT: attached with weights from the seed's streams, read back, and folded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import RankPlan
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adapters.attach import ADAPTER, peft_task
from adaptive_lora.methods.adapters.audit_tuner import trained_tensors
from adaptive_lora.methods.adapters.dropout import SiteDropout
from adaptive_lora.methods.adapters.factors import Factors
from adaptive_lora.methods.adapters.head import head_problems, in_head
from adaptive_lora.methods.phases import Phases
from adaptive_lora.seeding import rng_for

_SPREAD = 0.02
"""Standard deviation of the initial P and Q, as in PEFT."""


def attach_adalora(
    model: PreTrainedModel,
    start: RankPlan,
    options: AdaLora,
    phases: Phases,
    *,
    seed: int,
    dropout: float,
    head: Sequence[str] = (),
) -> PeftModel:
    """Attach AdaLoRA layers of one rank; E starts at zero, so the model initially computes the base's function.

    `audit_adalora` then compares what was built.

    Args:
        model: the frozen base.
        start: starting plan, with the same rank at every site.
        options: options of the method.
        phases: phases of rank changes.
        seed: seed of P, Q and the dropout masks.
        dropout: probability of dropping an input.
        head: modules trained in addition to the adapters.
    """
    (rank,) = {entry.rank for entry in start.entries}
    modules = dict(model.named_modules())
    config = AdaLoraConfig(
        task_type=peft_task(model),
        modules_to_save=list(head) or None,
        init_r=rank,
        target_r=1,  # the final number of ranks is set on the allocator
        tinit=phases.warmup,
        tfinal=phases.steps - phases.settle,
        deltaT=phases.interval,
        total_step=phases.steps,
        orth_reg_weight=options.orthogonality,
        lora_alpha=start.scale_of(start.entries[0]) * rank,  # type: ignore[arg-type]
        target_modules=[entry.site.name for entry in start.entries],
        lora_dropout=dropout,
        fan_in_fan_out=all(isinstance(modules[e.site.name], Conv1D) for e in start.entries),
    )
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, config)
    for name, layer in adalora_layers(adapted).items():
        # On a bf16 base peft 0.21 rounds ranknum to bf16 and lets it be trained.
        layer.ranknum[ADAPTER].requires_grad_(False).fill_(float(rank))
        with torch.no_grad():
            layer.lora_A[ADAPTER].copy_(_initial(seed, "adalora_Q", name, rank, layer.in_features))
            layer.lora_B[ADAPTER].copy_(_initial(seed, "adalora_P", name, rank, layer.out_features).T)
        if dropout > 0:
            layer.lora_dropout[ADAPTER] = SiteDropout(dropout, seed=seed, site=name)
    return adapted


def _initial(seed: int, part: str, site: str, rank: int, width: int) -> torch.Tensor:
    """Return a matrix (rank, width) from the site's stream; a smaller rank is a prefix of a larger one."""
    values = rng_for(seed, part, site).standard_normal((rank, width), dtype="float32")
    return torch.from_numpy(values * _SPREAD)


def adalora_layers(adapted: Any) -> dict[str, Any]:
    """Return name of the wrapped base module -> AdaLoRA layer."""
    return {
        name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)
    }


def training_parameters(start: RankPlan) -> int:
    """Return the number of parameters that AdaLoRA trains: P, Q and E of every starting triplet."""
    return start.trainable_parameters + sum(entry.rank for entry in start.entries)


def audit_adalora(adapted: PeftModel, start: RankPlan, head: Sequence[str] = ()) -> None:
    """Compare sites, scales and the number of trainable parameters with the starting plan.

    Raises:
        AdapterError: there are differences; the message lists all of them.
    """
    layers = adalora_layers(adapted)
    planned = {entry.site.name: start.scale_of(entry) for entry in start.entries}
    problems = [f"{name} differs in adaptation" for name in layers.keys() ^ planned.keys()]
    problems += [
        f"{name}: scale is {scale_of(layers[name])}, planned {scale}"
        for name, scale in planned.items()
        if name in layers and not math.isclose(scale_of(layers[name]), scale, rel_tol=1e-4)
    ]
    problems += head_problems(adapted, head)
    trained = trained_tensors(adapted)
    total = sum(p.numel() for name, p in trained.items() if not in_head(name, head))
    if total != training_parameters(start):
        problems.append(f"{total:,} parameters trainable, planned {training_parameters(start):,}")
    if problems:
        raise AdapterError("AdaLoRA differs from its plan: " + "; ".join(sorted(problems)))


def scale_of(layer: Any) -> float:
    """Return the factor of a layer's update; PEFT adds 1e-5 to the starting rank."""
    return float(layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].detach() + 1e-5))


def fold(adapted: PeftModel, kept: Mapping[str, list[bool]], plan: RankPlan) -> dict[str, Factors]:
    """Return plain LoRA factors with the same update: B = P, A = E·Q times the ratio of scales.

    Args:
        adapted: trained AdaLoRA model.
        kept: site name -> per triplet, whether it remains.
        plan: final ranks and scales.
    """
    layers, folded = adalora_layers(adapted), {}
    for entry in plan.entries:
        name = entry.site.name
        layer, chosen = layers[name], torch.tensor(kept[name], device=adapted.device)
        a, b, e = (part[ADAPTER].detach() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        rest = scale_of(layer) / plan.scale_of(entry)
        folded[name] = Factors(a=a[chosen] * e[chosen] * rest, b=b[:, chosen].clone())
    return folded
