"""Attaching a plan's LoRA adapters to a base, with common random numbers across methods."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import Scaling
from adaptive_lora.methods.adapters.dropout import SiteDropout
from adaptive_lora.methods.adapters.head import untrained_heads
from adaptive_lora.models.errors import model_errors
from adaptive_lora.seeding import rng_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adaptive_lora.allocation import RankPlan

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def attach(model: PreTrainedModel, plan: RankPlan, *, seed: int, dropout: float, head: Sequence[str] = ()) -> PeftModel:
    """Attach the adapters of a plan; `detach` restores the base.

    B starts at zero, so the model initially computes the base's function. A is drawn from a stream of
    the seed and the site's name, equal for all methods; rank r is a prefix of every larger rank.

    Args:
        model: the frozen base.
        plan: rank and alpha per site.
        seed: seed of A and of the dropout masks.
        dropout: probability of dropping an input of A.
        head: modules trained in addition to the adapters.

    Raises:
        ModelError: PEFT cannot adapt the model; the message names the site.
    """
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        with model_errors(f"{plan.method} cannot be attached to {type(model).__name__}", model):
            adapted = get_peft_model(model, lora_config(model, plan, dropout, head))
    layers = lora_layers(adapted)
    for entry in plan.entries:
        layer = layers[entry.site.name]
        with torch.no_grad():
            weight = layer.lora_A[ADAPTER].weight
            weight.copy_(initial_a(seed, entry.site.name, entry.rank, entry.site.in_features))
        if dropout > 0:
            layer.lora_dropout[ADAPTER] = SiteDropout(dropout, seed=seed, site=entry.site.name)
    start_magnitudes(adapted)
    return adapted


def start_magnitudes(adapted: PeftModel) -> None:
    """Set the initial magnitudes of DoRA layers to the norms of W + scale·B·A, in float32.

    PEFT computes them before A and B are replaced, and in the base's precision.
    """
    for layer in lora_layers(adapted).values():
        if layer.use_dora[ADAPTER]:
            layer.lora_magnitude_vector[ADAPTER].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[ADAPTER].weight.detach().float(),
                lora_B=layer.lora_B[ADAPTER].weight.detach().float(),
                scaling=layer.scaling[ADAPTER],
            )


def detach(adapted: PeftModel) -> None:
    """Remove the adapters, so that the base model is as before `attach`."""
    untrained = untrained_heads(adapted)
    base = adapted.unload()
    for name, module in untrained.items():
        base.set_submodule(name, module)


def lora_config(model: nn.Module, plan: RankPlan, dropout: float, head: Sequence[str] = ()) -> LoraConfig:
    """Return the stock PEFT configuration of a plan.

    Patterns have full site names: PEFT uses the first key that matches the end of a name as a regular
    expression, so shorter keys (`c_proj`) silently take precedence over longer ones.
    """
    modules, endings = dict(model.named_modules()), _endings(model)
    ranks = Counter(entry.rank for entry in plan.entries)
    common = ranks.most_common(1)[0][0]
    alpha = next(entry.alpha for entry in plan.entries if entry.rank == common)
    mixed_ranks = len(ranks) > 1
    mixed_alphas = len({entry.alpha for entry in plan.entries}) > 1
    return LoraConfig(
        task_type=peft_task(model),
        r=common,
        lora_alpha=_whole(alpha),
        target_modules=module_targets(model, [entry.site.name for entry in plan.entries]),
        use_rslora=plan.scaling is Scaling.RSLORA,
        use_dora=plan.dora,
        rank_pattern=_pattern(plan.rank_pattern(), endings) if mixed_ranks else {},
        alpha_pattern=_pattern(plan.alpha_pattern(), endings) if mixed_alphas else {},
        lora_dropout=dropout,
        modules_to_save=list(head) or None,
        fan_in_fan_out=all(isinstance(modules[e.site.name], Conv1D) for e in plan.entries),
    )


def peft_task(model: nn.Module) -> str | None:
    """Return PEFT's task type of a model class, or None for PEFT's general wrapper."""
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "SEQ_2_SEQ_LM"
    return None


def _endings(model: nn.Module) -> set[str]:
    """Return all proper suffixes, by component, of module names."""
    names = (name for name, _ in model.named_modules())
    return {name[at + 1 :] for name in names for at, sign in enumerate(name) if sign == "."}


def module_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return modules for PEFT as a list, or as one regular expression where a list would match more.

    PEFT compares listed names with the end of a module's name: `layers.0.fc1` would also adapt
    `vision.layers.0.fc1`. A single text is matched against the whole name.
    """
    if _endings(model).isdisjoint(names):
        return names
    return "|".join(re.escape(name) for name in names)


def _pattern(values: Mapping[str, float], endings: Set[str]) -> dict[str, Any]:
    """Return a rank or alpha pattern; a name that is the suffix of another is anchored at its start.

    The order of keys cannot be used for this, because PEFT sorts them when saving.
    """
    return {f"^{re.escape(name)}" if name in endings else name: _whole(value) for name, value in values.items()}


def _whole(alpha: float) -> Any:
    """Return a whole-number alpha as an integer, as in PEFT's own configurations."""
    return int(alpha) if float(alpha).is_integer() else alpha


def initial_a(seed: int, site: str, rank: int, in_features: int) -> torch.Tensor:
    """Return A of shape (rank, in_features): Kaiming uniform with a = sqrt(5), as in PEFT.

    The bound is 1/sqrt(in_features) at any rank; rows are drawn in order from one stream, so a
    smaller rank is a prefix of a larger one.
    """
    bound = 1.0 / math.sqrt(in_features)
    values = rng_for(seed, "lora_A", site).random((rank, in_features), dtype="float32")
    return torch.from_numpy(values * (2 * bound) - bound)


def lora_layers(adapted: Any) -> dict[str, Any]:
    """Return name of the wrapped base module -> LoRA layer."""
    from peft.tuners.lora import LoraLayer

    base: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
