"""Custom tuners, which are not in PEFT: attaching, saving and training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaptive_lora.allocation import TunerPlan
from adaptive_lora.methods.adapters.audit_tuner import audit_tuner, audit_tuner_moved
from adaptive_lora.methods.adapters.head import in_head
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.seeding import rng_for
from adaptive_lora.serving.custom_tuner import FAMILY, WEIGHTS, AdaptedModel


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
    bottlenecks = plan.settings.get("bottlenecks", {})
    adapted = AdaptedModel(
        model,
        trained=list(dict.fromkeys([*_of_the_base(plan), *_of_the_head(model, head)])),
        bottlenecks=bottlenecks,
        nonlinearity=plan.settings.get("nonlinearity", "gelu"),
    )
    for name in bottlenecks:
        weight = model.get_parameter(f"{name}.bottleneck.down.weight")
        bias = model.get_parameter(f"{name}.bottleneck.down.bias")
        bound = weight.shape[1] ** -0.5  # torch's own bound for a linear layer
        draws = rng_for(seed, "bottleneck", name).random(tuple(weight.shape), dtype="float32")
        with torch.no_grad():
            weight.copy_(torch.from_numpy(draws * (2 * bound) - bound))
            bias.zero_()
    return adapted


def save_custom_tuner(adapted: AdaptedModel, folder: Path, plan: TunerPlan) -> None:
    """Write the trained tensors and their places in the base; above 5 GB in several files."""
    from huggingface_hub import save_torch_state_dict

    state = {name: tensor.contiguous() for name, tensor in adapted.trained_state().items()}
    save_torch_state_dict(state, folder, filename_pattern=WEIGHTS, max_shard_size="5GB")
    settings = {
        "family": plan.family,
        "trained": [name for name in state if ".bottleneck." not in name],
        "bottlenecks": dict(plan.settings.get("bottlenecks", {})),
        "nonlinearity": plan.settings.get("nonlinearity", "gelu"),
    }
    (folder / FAMILY).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _of_the_head(model: Any, head: Sequence[str]) -> list[str]:
    return [name for name, _ in model.named_parameters() if in_head(name, head)]


def _of_the_base(plan: TunerPlan) -> list[str]:
    """Return the names of trained tensors that are the base's own."""
    return [name for name in plan.tensors if ".bottleneck." not in name]


def fit_custom_tuner(trial: TrialContext) -> TrainedTrial:
    """Make the planned tensors trainable, and train them."""
    plan = trial.tuner_plan
    adapted = trial.adopt(
        attach_custom_tuner(trial.base, plan, seed=trial.seed, head=trial.head), undo=AdaptedModel.release
    )
    audit_tuner(adapted, plan.tensors, trial.head)
    start = adapted.start_state()
    result = trial.train(adapted)
    still = audit_tuner_moved(adapted, start, must_move=lambda name: name.endswith("bottleneck.up.weight"))
    return TrainedTrial(
        model=adapted,
        plan=plan,
        result=result,
        training_parameters=plan.trainable_parameters,
        extra={"unmoved_tensors": float(still)},
    )
