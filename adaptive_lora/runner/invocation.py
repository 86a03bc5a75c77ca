"""Activated LoRA (aLoRA): the tokens from which on an adapter acts, and the check that every example has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptive_lora.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_lora.allocation import MethodSpec
    from adaptive_lora.runner.context import StudyContext


def invocation_ids(context: StudyContext, text: str | None) -> list[int] | None:
    """Return the token ids of an invocation text by the base's tokenizer; None without a text."""
    return None if text is None else [*context.base.tokenizer(text, add_special_tokens=False)["input_ids"]]


def require_invocation(context: StudyContext, spec: MethodSpec) -> None:
    """Check that the adapter of a method with invocation tokens acts in every example.

    Raises:
        ConfigError: the task is not causal, PEFT cannot train it as set, or a prompt lacks the tokens.
    """
    from adaptive_lora.methods.adapters.attach import peft_task

    ids = invocation_ids(context, spec.alora)
    if ids is None:
        return
    if context.task.name != "causal" or peft_task(context.base.model) != "CAUSAL_LM":
        raise ConfigError(
            f"{spec.label}: alora is for causal language models, whose tokens before the invocation do not depend on "
            f"those after it; this is the task {context.task.name} on {type(context.base.model).__name__}."
        )
    train = context.config.train
    if train.gradient_checkpointing or train.max_memory is not None:
        raise ConfigError(
            f"{spec.label}: alora does not go with gradient_checkpointing, nor with max_memory, which may turn it on: "
            "PEFT then takes one forward pass per backward pass alone, and a validation is one without. Leave both out."
        )
    splits = context.splits(0)
    examples = [*splits.train, *splits.validation, *splits.test]
    lacking = [one.id for one in examples if not _holds(one.input_ids[: one.prompt_length or None], ids)]
    if lacking:
        raise ConfigError(
            f"{spec.label}: {len(lacking)} of {len(examples)} prompts, such as {lacking[0]}, lack the tokens {ids} of "
            f"alora={spec.alora!r}, from which on the adapter acts. Give a text that the template writes ahead of "
            "every response and that the tokenizer divides alike there, such as a special token."
        )


def _holds(row: tuple[int, ...], ids: list[int]) -> bool:
    """Return whether a row has these token ids side by side."""
    return any([*row[at : at + len(ids)]] == ids for at in range(len(row) - len(ids) + 1)) and bool(ids)
