"""Tuners other than LoRA: PEFT's and custom ones, built from plans with initial weights from the seed's streams."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import IA3Config, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import nn

from adaptive_lora.allocation import TunerPlan
from adaptive_lora.methods.adapters.attach import (
    ADAPTER,
    detach,
    in_head,
    module_targets,
    peft_model,
    peft_task,
    stores_transposed,
    uniform_rows,
)
from adaptive_lora.methods.adapters.audit import audit_tuner, audit_tuner_moved, trained_tensors
from adaptive_lora.methods.adapters.peft_build import configuration
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.seeding import rng_for, torch_stream
from adaptive_lora.serving.custom_tuner import WEIGHTS, AdaptedModel
from adaptive_lora.serving.safety import FAMILY

log = logging.getLogger(__name__)

_ROUNDED = 64
"""Largest difference of outputs by rounding, in units of the base's precision times the largest output."""
_PREFIX_SPREAD = 0.02
"""Standard deviation of a prefix's initial keys and values, equal to that of the base's weights."""


def fit_tuner(trial: TrialContext) -> TrainedTrial:
    """Attach and train the plan; of P-tuning's encoder, keep the computed embeddings."""
    plan = trial.tuner_plan
    is_peft, is_any_type = plan.family in CONFIGURATIONS, plan.family == "peft"
    attach = attach_peft_tuner if is_peft else attach_custom_tuner
    undo = detach_peft_tuner if is_peft else AdaptedModel.release
    before = trial.probe(trial.base) if is_any_type else None
    adapted = trial.adopt(attach(trial.base, plan, seed=trial.seed, head=trial.head), undo=undo)
    audit_tuner(adapted, plan.tensors, trial.head)
    extra = {} if before is None else {"start_difference": _start_difference(adapted, before, trial)}
    if isinstance(adapted, AdaptedModel):
        start = adapted.start_state()
    else:
        start = {name: tensor.detach().cpu().clone() for name, tensor in trained_tensors(adapted).items()}
    result = trial.train(adapted)
    all_move = is_peft and not is_any_type
    still = audit_tuner_moved(adapted, start, must_move=lambda name: all_move or name.endswith("bottleneck.up.weight"))
    if plan.kept is not None:
        keep_the_embeddings(adapted)
    return TrainedTrial(
        model=adapted,
        plan=plan,
        result=result,
        training_parameters=plan.trainable_parameters,
        extra=extra if all_move else {**extra, "unmoved_tensors": float(still)},
    )


def _start_difference(adapted: Any, before: torch.Tensor, trial: TrialContext) -> float:
    """Return the largest difference of the outputs from the base's at the start of training; say it where it is large.

    Types of adapters with a random update change the base's function at once.
    """
    found = float((trial.probe(adapted) - before).abs().max())
    rounding = _ROUNDED * torch.finfo(next(trial.base.parameters()).dtype).eps
    if found > rounding * float(before.abs().max()):
        log.warning("%s does not start as the base: its outputs differ by up to %.2g.", trial.method.label, found)
    return found


# PEFT's tuners


def attach_peft_tuner(model: Any, plan: TunerPlan, *, seed: int, head: Sequence[str] = ()) -> PeftModel:
    """Attach the tuner of a plan; `detach_peft_tuner` restores the base.

    Args:
        model: the frozen base.
        plan: tuner and settings.
        seed: seed of the initial weights.
        head: modules of the task trained in addition to the plan.
    """
    config: Any = CONFIGURATIONS[plan.family](model, plan.settings)
    if head:
        config.modules_to_save = list(head)
    if plan.family == "peft":
        if getattr(config, "random_seed", 0) is None:
            config.random_seed = seed
        # PEFT draws the initial weights of its types; it warns of each layer that it builds.
        with torch_stream(seed, "peft", plan.settings["type"]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft_model(model, config, plan.method)
    adapted = peft_model(model, config, plan.method)
    with torch.no_grad():
        for name, parameter in trained_tensors(adapted).items():
            if not in_head(name, head):
                parameter.copy_(_initial(model, plan, name, parameter, seed))
    return adapted


def detach_peft_tuner(adapted: PeftModel) -> None:
    """Restore the base; soft prompts do not change it."""
    if not adapted.active_peft_config.is_prompt_learning:
        detach(adapted)
        return
    # PEFT's generate leaves the base's own method as an attribute of the object.
    vars(adapted.base_model).pop("prepare_inputs_for_generation", None)


def keep_the_embeddings(adapted: PeftModel) -> None:
    """Replace P-tuning's encoder by the embeddings that it computes.

    PEFT does this when the adapter is loaded, outside autocast, so that the tested and the served
    embeddings would differ by rounding.
    """
    encoder: Any = adapted.prompt_encoder[ADAPTER]
    with torch.no_grad():
        written = adapted.get_prompt_embedding_to_save(ADAPTER)
        encoder.embedding.weight.copy_(written.to(encoder.embedding.weight.device))
    encoder.mlp_head = nn.Identity()


def _prompt(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": model.config.get_text_config().num_attention_heads,  # PEFT knows not all names of it
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings["tokens"],
        "token_dim": settings["width"],
        "num_layers": settings["layers"],
    }


def _prompt_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    return PromptTuningConfig(**_prompt(model, settings), prompt_tuning_init="RANDOM")


def _p_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    width = settings["encoder_width"]
    return PromptEncoderConfig(
        **_prompt(model, settings), encoder_reparameterization_type="MLP", encoder_hidden_size=width
    )


def _prefix_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    heads = settings["kv_heads"]  # PEFT supports grouped keys, but not Falcon's single key head
    sizes = {"token_dim": heads * settings["head_dim"], "num_attention_heads": heads}
    return PrefixTuningConfig(**{**_prompt(model, settings), **sizes})


def _ia3(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    targets = settings["targets"]
    return IA3Config(
        task_type=peft_task(model),
        target_modules=module_targets(model, targets),
        feedforward_modules=module_targets(model, settings["feed_forward"]),
        fan_in_fan_out=stores_transposed(model, targets),
    )


CONFIGURATIONS: Mapping[str, Callable[[nn.Module, Mapping[str, Any]], PeftConfig]] = MappingProxyType(
    {
        "prompt_tuning": _prompt_tuning,
        "p_tuning": _p_tuning,
        "prefix_tuning": _prefix_tuning,
        "ia3": _ia3,
        "peft": configuration,
    }
)
"""Tuner of PEFT -> function from the base and the plan's settings to its configuration."""


def _initial(model: Any, plan: TunerPlan, name: str, parameter: nn.Parameter, seed: int) -> torch.Tensor:
    """Return the initial value of a trained tensor, from a stream of seed, tuner and name.

    The first of more virtual tokens are equal to those of fewer.
    """
    if plan.family == "ia3":
        return torch.ones_like(parameter)
    rng = rng_for(seed, plan.family, name)
    if plan.family == "prompt_tuning":
        words: torch.Tensor = model.get_input_embeddings().weight
        drawn = rng.integers(0, len(words), size=len(parameter))
        return words.detach()[torch.from_numpy(drawn).to(words.device)].float()
    shape = tuple(parameter.shape)
    if "mlp_head" in name:  # torch's default for linear layers; a bias has the bound of its layer's inputs
        inputs = plan.tensors[f"{name.rpartition('.')[0]}.weight"][1]
        return uniform_rows(rng, shape, inputs**-0.5)
    spread = _PREFIX_SPREAD if plan.family == "prefix_tuning" else 1.0  # torch's default for embeddings
    return torch.from_numpy(rng.standard_normal(shape, dtype="float32") * spread)


# Custom tuners


def attach_custom_tuner(model: Any, plan: TunerPlan, *, seed: int, head: Sequence[str] = ()) -> AdaptedModel:
    """Make the plan's tensors trainable in a base; `AdaptedModel.release` reverses it.

    The model initially computes the base's function: weights start unchanged, adapters as the
    identity. W_down is drawn from the seed's stream of its site, and a smaller width has the first
    rows of a larger one. Its bias starts at zero, as in BERT: with a random bias, inputs much smaller
    than it leave units of a ReLU dead for every token.

    Args:
        model: the frozen base.
        plan: names, widths and nonlinearity.
        seed: seed of W_down.
        head: modules of the task trained in addition to the plan.
    """
    own = [name for name in plan.tensors if ".bottleneck." not in name]
    of_head = [name for name, _ in model.named_parameters() if in_head(name, head)]
    adapted = AdaptedModel(model, trained=list(dict.fromkeys([*own, *of_head])), **_inserted(plan))
    for name in _inserted(plan)["bottlenecks"]:
        weight = model.get_parameter(f"{name}.bottleneck.down.weight")
        bound = weight.shape[1] ** -0.5  # torch's own bound for a linear layer
        with torch.no_grad():
            weight.copy_(uniform_rows(rng_for(seed, "bottleneck", name), tuple(weight.shape), bound))
            model.get_parameter(f"{name}.bottleneck.down.bias").zero_()
    return adapted


def save_custom_tuner(adapted: AdaptedModel, folder: Path, plan: TunerPlan) -> None:
    """Write the trained tensors and their places in the base; above 5 GB in several files."""
    from huggingface_hub import save_torch_state_dict

    state = {name: tensor.contiguous() for name, tensor in adapted.trained_state().items()}
    save_torch_state_dict(state, folder, filename_pattern=WEIGHTS, max_shard_size="5GB")
    trained = [name for name in state if ".bottleneck." not in name]
    settings = {"family": plan.family, "trained": trained, **_inserted(plan)}
    (folder / FAMILY).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _inserted(plan: TunerPlan) -> dict[str, Any]:
    """Return the widths of bottlenecks by their place, and their nonlinearity."""
    defaults = {"bottlenecks": {}, "nonlinearity": "gelu"}
    return {name: plan.settings.get(name, default) for name, default in defaults.items()}
