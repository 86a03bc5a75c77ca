"""The recipes by name. To add one, write its function in a file beside this and a line here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Protocol

from adaptive_lora.study.recipes.adalora import adalora
from adaptive_lora.study.recipes.custom_tuner import custom_tuner
from adaptive_lora.study.recipes.eva import eva
from adaptive_lora.study.recipes.gora import gora
from adaptive_lora.study.recipes.grow_prune import grow_prune
from adaptive_lora.study.recipes.peft_tuner import peft_tuner
from adaptive_lora.study.recipes.plain import plain
from adaptive_lora.study.recipes.trial_context import TrainedTrial, TrialContext
from adaptive_lora.study.recipes.truncation import truncate, truncate_retrain


class Recipe(Protocol):
    """Turns a method's plan into a trained model."""

    def __call__(self, job: TrialContext) -> TrainedTrial:
        """Attach, train and finish.

        The model comes back on the base, built as `TrainedTrial.plan` says, and is tested and saved as
        it is; whoever called releases it.
        """


RECIPES: MappingProxyType[str, Recipe] = MappingProxyType(
    {
        "lora": plain,
        "adalora": adalora,
        "grow_prune": grow_prune,
        "eva": eva,
        "gora": gora,
        "truncate": truncate,
        "truncate_retrain": truncate_retrain,
        "own_family": custom_tuner,
        "peft_family": peft_tuner,
    }
)
"""`recipe` of an options class -> what it does; options that name none are plain LoRA."""
