"""Inputs of a training, and the events that it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adaptive_lora.config import TrainConfig
from adaptive_lora.data import Batch
from adaptive_lora.methods.base import TrainerCallback
from adaptive_lora.models.losses import Loss, LossByExample, causal_loss
from adaptive_lora.training.memory import Estimate
from adaptive_lora.training.state import TrainerState


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """Report of an optimiser step, for progress display and tracking."""

    step: int
    total_steps: int
    loss: float
    tokens: int
    """Number of tokens processed so far, without padding."""
    validation_loss: float | None = None


def total_steps(examples: int, config: TrainConfig) -> int:
    """Return the number of optimiser steps of a training over `examples` examples."""
    per_epoch = math.ceil(math.ceil(examples / config.batch_size) / config.accumulation)
    steps = max(1, math.ceil(config.epochs * per_epoch))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def is_validated(step: int, steps: int, validations: int) -> bool:
    """Return whether a validation pass follows an optimiser step (from 1) of `steps`."""
    return (step * validations) // steps > ((step - 1) * validations) // steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainInputs:
    """Inputs of a training other than the model and its settings."""

    examples: Sequence[Any]
    """Training split, prepared by the task."""
    collate: Callable[[Sequence[Any]], Batch]
    """Function from examples to a batch."""
    validate: Callable[[nn.Module], float]
    """Function from the model to its validation loss."""
    loss: Loss = causal_loss
    """Loss to minimise; equal for all methods of a comparison."""
    losses_by_example: LossByExample | None = None
    """Loss per example, needed to train trials together; None where the task has none."""
    running: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()
    """Context manager around the training of the model, required by the loss."""
    on_step: Callable[[StepEvent], None] = lambda event: None
    """Function called after every optimiser step."""
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    """Site name -> factor of its learning rate; other sites have 1."""
    lora_plus: float = 1.0
    """Factor of the learning rate of every B."""
    callback: TrainerCallback = field(default_factory=TrainerCallback)
    """Callback of the method."""
    on_snapshot: Callable[[int, Callable[[], TrainerState]], None] = lambda step, take: None
    """Function called after every optimiser step with the step and a function that makes a snapshot."""
    on_stop: Callable[[int, Callable[[], TrainerState]], None] = lambda step, take: None
    """Function called in the same way when the training ends or is stopped, also within a step."""
    resume: TrainerState | None = None
    """Snapshot of the same training to continue from, or None."""
    micro_batch: int | None = None
    """Maximum number of examples per forward pass; None: the whole batch, until memory is short."""
    memory: Estimate | None = None
    """Estimated memory of the whole batch in one forward pass, which limits the trials trained together."""


def events_of(snapshot: TrainerState, total: int) -> Iterator[StepEvent]:
    """Yield the step events that were reported up to a snapshot.

    Args:
        snapshot: snapshot of a training.
        total: number of optimiser steps of the whole training.
    """
    losses, tokens = snapshot["losses"], snapshot["step_tokens"]
    validation = dict(snapshot["validation"])
    for step in range(1, snapshot["reported"] + 1):
        yield StepEvent(
            step=step,
            total_steps=total,
            loss=losses[step - 1],
            tokens=tokens[step - 1],
            validation_loss=validation.get(step),
        )
