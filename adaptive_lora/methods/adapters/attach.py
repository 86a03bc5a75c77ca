"""Attaching a plan's LoRA adapters to a base, with common random numbers across methods."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import Scaling
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.start import Start
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters.dropout import SiteDropout
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.sharding import gather_in_forward
from adaptive_lora.models.sites import taken_for_experts
from adaptive_lora.seeding import rng_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adaptive_lora.allocation import RankPlan

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def attach(
    model: PreTrainedModel,
    plan: RankPlan,
    *,
    seed: int,
    dropout: float,
    head: Sequence[str] = (),
    invocation: list[int] | None = None,
) -> PeftModel:
    """Attach the adapters of a plan; `detach` restores the base.

    B starts at zero, so the model initially computes the base's function. A is drawn from a stream of
    the seed and the site's name, equal for all methods; rank r is a prefix of every larger rank.

    A plan whose start takes a part out of the weights is built at twice its ranks (`RankPlan.built`). A that are not
    trained (LoRA-FA) are frozen.

    Args:
        model: the frozen base.
        plan: rank and alpha per site.
        seed: seed of A and of the dropout masks.
        dropout: probability of dropping an input of A.
        head: modules trained in addition to the adapters.
        invocation: token ids from whose last occurrence on the adapters act (aLoRA); None: everywhere.

    Raises:
        ModelError: PEFT cannot adapt the model; the message names the site.
    """
    config = lora_config(model, plan.built, dropout, head)
    config.alora_invocation_tokens = invocation
    adapted = peft_model(model, config, plan.method)
    for name, layer in lora_layers(adapted).items():
        with torch.no_grad():
            weight = layer.lora_A[ADAPTER].weight
            weight.copy_(initial_a(seed, name, layer.r[ADAPTER], weight.shape[1], experts_of(layer)))
        weight.requires_grad_(not plan.frozen_a)
        if dropout > 0:
            layer.lora_dropout[ADAPTER] = SiteDropout(dropout, seed=seed, site=name)
    start_magnitudes(adapted)
    return adapted


def peft_model(model: Any, config: PeftConfig, method: str) -> PeftModel:
    """Return a base with PEFT's layers of a configuration.

    Raises:
        ModelError: PEFT cannot adapt the model; the message names the method and the module.
    """
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # It looks for patterns among modules, not among target_parameters, where it uses them; the audit tells.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match", RuntimeWarning)
        with model_errors(f"{method} cannot be attached to {type(model).__name__}", model):
            adapted: PeftModel = get_peft_model(model, config)
    gather_in_forward(adapted)
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
    # `unload` keeps PEFT's copies of the head's modules.
    untrained = {
        name: module.original_module
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base: Any = adapted.unload()
    for name, module in untrained.items():
        base.set_submodule(name, module)


def lora_config(model: nn.Module, plan: RankPlan, dropout: float, head: Sequence[str] = ()) -> LoraConfig:
    """Return the stock PEFT configuration of a plan.

    Patterns have full site names: PEFT uses the first key that matches the end of a name as a regular
    expression, so shorter keys (`c_proj`) silently take precedence over longer ones.

    Raises:
        ConfigError: PEFT adapts some sites by their weights, which do not take what the plan wants.
    """
    require_parameters(model, plan, dropout)
    endings = _endings(model)
    by_weight = parameter_targets(model, plan)
    names = [entry.site.name for entry in plan.entries if entry.site.name not in by_weight]
    ranks = Counter(entry.rank for entry in plan.entries)
    common = ranks.most_common(1)[0][0]
    alpha = next(entry.alpha for entry in plan.entries if entry.rank == common)
    mixed_ranks = len(ranks) > 1
    mixed_alphas = len({entry.alpha for entry in plan.entries}) > 1
    return LoraConfig(
        task_type=peft_task(model),
        r=common,
        lora_alpha=_whole(alpha),
        target_modules=module_targets(model, names),
        target_parameters=list(by_weight.values()) or None,
        use_rslora=plan.scaling is Scaling.RSLORA,
        use_dora=plan.dora,
        rank_pattern=_pattern(_renamed(plan.rank_pattern(), by_weight), endings) if mixed_ranks else {},
        alpha_pattern=_pattern(_renamed(plan.alpha_pattern(), by_weight), endings) if mixed_alphas else {},
        lora_dropout=dropout,
        modules_to_save=list(head) or None,
        fan_in_fan_out=bool(names) and stores_transposed(model, names),
        **_start_settings(plan.init),
    )


def _start_settings(start: Start) -> dict[str, Any]:
    """Return PEFT's settings of initial weights; of those of `RankPlan.built`, none that changes the base."""
    if start is Start.DEFAULT:
        return {}
    settings: Mapping[Start, dict[str, Any]] = {
        Start.CORDA: {"corda_config": CordaConfig()},
        Start.EVA: {"eva_config": EvaConfig(rho=1.0)},
        Start.LOFTQ: {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        Start.LORA_GA: {"lora_ga_config": LoraGAConfig()},
    }
    return {"init_lora_weights": str(start), **settings.get(start, {})}


def parameter_targets(model: nn.Module, plan: RankPlan) -> dict[str, str]:
    """Return the sites that PEFT adapts by their weights (`target_parameters`): site name -> name of the parameter.

    These are stacks of routed experts, and linear layers that PEFT would take for experts by their names.
    """
    linear = [entry.site.name for entry in plan.entries if not entry.site.experts]
    taken = taken_for_experts(model, linear)
    by_weight = {name: f"{name}.weight" for name in linear if name in taken}
    return by_weight | {entry.site.name: entry.site.name for entry in plan.entries if entry.site.experts}


def require_parameters(model: nn.Module, plan: RankPlan, dropout: float) -> None:
    """Check that sites that PEFT adapts by their weights have plain LoRA: no dropout, DoRA, aLoRA or packed weight.

    Raises:
        ConfigError: they have; the message names the setting and a site.
    """
    by_weight = parameter_targets(model, plan)
    packed = any(plan.base_of(entry) != BaseStorage.FULL for entry in plan.entries if entry.site.name in by_weight)
    wanted = {
        f"dropout {dropout:g}": dropout > 0,
        "dora": plan.dora,
        "alora": bool(plan.invocation),
        f"base={plan.base}": packed,
        f"init={plan.init}": plan.init is not Start.DEFAULT,
    }
    if by_weight and (wrong := [name for name, given in wanted.items() if given]):
        raise ConfigError(
            f"{plan.method}: PEFT adapts {len(by_weight)} sites of {type(model).__name__}, such as "
            f"{next(iter(by_weight))}, by their weights (target_parameters), without {' and '.join(wrong)}. Leave that "
            "out, or those sites, such as by placement=attention."
        )


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def stores_transposed(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether all these layers are GPT-2's Conv1D, which stores weights as (in, out)."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def peft_task(model: nn.Module) -> str | None:
    """Return PEFT's task type of a model class, or None for PEFT's general wrapper."""
    from transformers.models.auto import modeling_auto as auto

    names = {kind.__name__ for kind in type(model).__mro__}  # FSDP2 makes a subclass
    if names & {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        return "CAUSAL_LM"
    if names & {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}:
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


def initial_a(seed: int, site: str, rank: int, in_features: int, experts: int = 0) -> torch.Tensor:
    """Return A of shape (rank, in_features): Kaiming uniform with a = sqrt(5), as in PEFT.

    The bound is 1/sqrt(in_features) at any rank; rows are drawn in order from one stream, so a
    smaller rank is a prefix of a larger one. Of `experts` experts each has a stream of its own, and A has the shape
    (experts x rank, in_features), one expert after the other.
    """
    if experts:
        return torch.cat([initial_a(seed, f"{site}[{expert}]", rank, in_features) for expert in range(experts)])
    return uniform_rows(rng_for(seed, "lora_A", site), (rank, in_features), 1.0 / math.sqrt(in_features))


def uniform_rows(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """Return values uniform within ±bound, drawn row by row, float32."""
    values = rng.random(shape, dtype="float32")
    return torch.from_numpy(values * (2 * bound) - bound)


def lora_layers(adapted: Any) -> dict[str, Any]:
    """Return site name -> LoRA layer: the name of the wrapped linear layer, or of a stack of experts' weights."""
    return {
        site_of(name, module): module
        for name, module in base_of(adapted).named_modules()
        if isinstance(module, LoraLayer)
    }


def site_of(name: str, layer: LoraLayer) -> str:
    """Return the site of a LoRA layer by its module name; PEFT nests the layers of one module's parameters."""
    if not isinstance(layer, ParamWrapper):
        return name
    owner = name.removesuffix(".base_layer")
    while owner != name:
        name, owner = owner, owner.removesuffix(".base_layer")
    return owner if isinstance(layer.get_base_layer(), nn.Linear) else f"{owner}.{layer.parameter_name}"


def experts_of(layer: LoraLayer) -> int:
    """Return the number of experts whose factors a LoRA layer stacks; 0 for a linear layer."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) and layer.num_experts > 1 else 0


def base_of(adapted: Any) -> Any:
    """Return the base inside an adapted model; the model itself where it has no wrapper."""
    return adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted


# The head of a task: PEFT trains a copy of each of its modules (`modules_to_save`) and saves it with the adapter;
# custom tuners train the base's own module.


def in_head(name: str, head: Iterable[str]) -> bool:
    """Return whether a tensor, by its name in the base, belongs to a head."""
    return any(name.startswith(f"{module}.") for module in head)


def read_head(adapted: nn.Module, head: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return a copy of the trained head's tensors."""
    return {name: p.detach().clone() for name, p in head_tensors(adapted, head).items()}


def write_head(adapted: nn.Module, state: Mapping[str, torch.Tensor], head: Sequence[str]) -> None:
    """Copy tensors from `read_head` into a model with the same head."""
    with torch.no_grad():
        for name, tensor in head_tensors(adapted, head).items():
            tensor.copy_(state[name])


def head_tensors(adapted: Any, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return name in the base -> trained tensor of the head."""
    return {
        name.replace(".modules_to_save.default", ""): parameter
        for name, parameter in base_of(adapted).named_parameters()
        if in_head(name, head) and ".original_module." not in name
    }
