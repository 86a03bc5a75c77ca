"""PEFT's tuners other than LoRA: built from plans, with initial weights from the seed's streams."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from peft import (
    IA3Config,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import TunerPlan
from adaptive_lora.methods.adapters.attach import ADAPTER, detach, module_targets, peft_task
from adaptive_lora.methods.adapters.audit_tuner import audit_tuner, audit_tuner_moved, trained_tensors
from adaptive_lora.methods.adapters.head import in_head
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.models.errors import model_errors
from adaptive_lora.seeding import rng_for

_PREFIX_SPREAD = 0.02
"""Standard deviation of a prefix's initial keys and values, equal to that of the base's weights."""


def attach_peft_tuner(model: Any, plan: TunerPlan, *, seed: int, head: Sequence[str] = ()) -> PeftModel:
    """Attach what the plan says; `detach_peft_family` gives the untouched base back.

    Args:
        model: the frozen base.
        plan: tuner and settings.
        seed: seed of the initial weights.
        head: modules of the task trained in addition to the plan.
    """
    config: Any = tuner_config(model, plan)
    if head:
        config.modules_to_save = list(head)
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        with model_errors(f"{plan.method} cannot be attached to {type(model).__name__}", model):
            adapted: PeftModel = get_peft_model(model, config)
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


def tuner_config(model: nn.Module, plan: TunerPlan) -> PeftConfig:
    """Return the stock PEFT configuration of a plan."""
    return CONFIGURATIONS[plan.family](model, plan.settings)


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


def _prompt(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings["tokens"],
        "token_dim": settings["width"],
        "num_layers": settings["layers"],
    }


def _prompt_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    return PromptTuningConfig(**_prompt(settings), prompt_tuning_init="RANDOM")


def _p_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    return PromptEncoderConfig(
        **_prompt(settings), encoder_reparameterization_type="MLP", encoder_hidden_size=settings["encoder_width"]
    )


def _prefix_tuning(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    heads = settings["kv_heads"]  # PEFT supports grouped keys, but not Falcon's single key head
    sizes = {"token_dim": heads * settings["head_dim"], "num_attention_heads": heads}
    return PrefixTuningConfig(**{**_prompt(settings), **sizes})


def _ia3(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    targets = settings["targets"]
    fused = [isinstance(model.get_submodule(name), Conv1D) for name in targets]
    return IA3Config(
        task_type=peft_task(model),
        target_modules=module_targets(model, targets),
        feedforward_modules=module_targets(model, settings["feed_forward"]),
        fan_in_fan_out=all(fused),
    )


CONFIGURATIONS: Mapping[str, Callable[[nn.Module, Mapping[str, Any]], PeftConfig]] = MappingProxyType(
    {"prompt_tuning": _prompt_tuning, "p_tuning": _p_tuning, "prefix_tuning": _prefix_tuning, "ia3": _ia3}
)
"""Tuner -> function from the base and the plan's settings to its PEFT configuration."""


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
        bound = inputs**-0.5
        return torch.from_numpy(rng.random(shape, dtype="float32") * (2 * bound) - bound)
    spread = _PREFIX_SPREAD if plan.family == "prefix_tuning" else 1.0  # torch's default for embeddings
    return torch.from_numpy(rng.standard_normal(shape, dtype="float32") * spread)


def fit_peft_tuner(trial: TrialContext) -> TrainedTrial:
    """Attach and train; of P-tuning's encoder, keep the computed embeddings."""
    plan = trial.tuner_plan
    adapted = trial.adopt(attach_peft_tuner(trial.base, plan, seed=trial.seed, head=trial.head), undo=detach_peft_tuner)
    audit_tuner(adapted, plan.tensors, trial.head)
    start = {name: p.detach().cpu().clone() for name, p in trained_tensors(adapted).items()}
    result = trial.train(adapted)
    audit_tuner_moved(adapted, start, must_move=lambda name: True)
    if plan.kept is not None:
        keep_the_embeddings(adapted)
    return TrainedTrial(model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters)
