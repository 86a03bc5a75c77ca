"""Room of virtual tokens: examples with them must fit the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptive_lora.allocation import TunerPlan
from adaptive_lora.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_lora.runner.context import StudyContext


def require_room(context: StudyContext, plan: TunerPlan, fold: int) -> None:
    """Check that examples with their virtual tokens fit the base, and that a prefix can be trained.

    Args:
        context: context of the study.
        plan: plan with virtual tokens.
        fold: fold of the examples.

    Raises:
        ConfigError: they do not; the message gives the setting to change.
    """
    splits, most = context.splits(fold), context.base.max_positions
    parts = (splits.train, splits.validation, splits.test, *(one.examples for one in context.retained))
    longest = max(item.length for part in parts for item in part)
    if most is not None and longest + plan.positions > most:
        raise ConfigError(
            f"{plan.method}: its {plan.positions} virtual tokens and the longest example "
            f"({longest} tokens) are more than the base's {most} positions; set max_tokens to "
            f"{most - plan.positions} or take fewer virtual tokens."
        )
    if plan.family == "prefix_tuning" and context.config.train.gradient_checkpointing:
        raise ConfigError(
            f"{plan.method} keeps its prefix in the cache, which gradient checkpointing does "
            "not have; set gradient_checkpointing to false or leave the method out."
        )
