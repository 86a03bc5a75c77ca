"""Scores of a model on a split of the data, per example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adaptive_lora.config import EvaluationConfig
from adaptive_lora.data import Batch, TokenizedExample
from adaptive_lora.errors import ConfigError
from adaptive_lora.models.device import Runtime
from adaptive_lora.results import EvalResult, FloatArray
from adaptive_lora.serving import generate

_TOKENS_PER_EXAMPLE = 128
"""Number of tokens per example assumed by `eval_batch_size` for packed batches."""
SHARE_OF_SHORT_ANSWERS = 0.9
"""Minimum share of short responses for which `generate: auto` scores exact match."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleScores:
    """Scores of a batch's B examples."""

    nll: torch.Tensor
    """Loss summed over the example's supervised tokens, or other targets of its task, shape (B,)."""
    units: torch.Tensor
    """Number of these targets, shape (B,)."""
    correct: torch.Tensor | None
    """Number of targets predicted right, shape (B,); None for tasks without right predictions."""
    further: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name -> further scores, shape (B,)."""


class Prepared(Protocol):
    """An example as a task has prepared it for its model."""

    @property
    def id(self) -> str:
        """Identifier of the example."""

    @property
    def length(self) -> int:
        """Number of positions that it takes in the model."""

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens, or other targets of its task."""

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return its token ids by input name, and the spans with and without loss."""


class Scoring(Protocol):
    """Conversion of examples to batches, and of batches to scores."""

    unit: ClassVar[str]
    """Unit of the mean loss."""

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return a batch of prepared examples."""

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Run a model on a batch and score its examples."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context manager in which a model runs, by the fastest code that it supports."""

    def packs(self, model: nn.Module) -> bool:
        """Return whether batches run without padding there."""


def evaluate(
    model: nn.Module, examples: Sequence[Prepared], scoring: Scoring, *, runtime: Runtime, batch_size: int
) -> EvalResult:
    """Return loss and right predictions per example, without gradients.

    Examples are batched by length to save padding and returned in their own order.

    Args:
        model: model of the task; left in evaluation mode.
        examples: prepared examples, at least one.
        scoring: the task.
        runtime: device and precision of the forward passes.
        batch_size: number of examples per forward pass.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)
    nll = np.zeros(len(examples))
    tokens, correct = (np.zeros(len(examples), dtype=np.int64) for _ in range(2))
    further: dict[str, FloatArray] = {}
    judged = True
    if scoring.packs(model):
        groups = _by_tokens(order, examples, batch_size * _TOKENS_PER_EXAMPLE)
    else:
        groups = (order[at : at + batch_size] for at in range(0, len(order), batch_size))
    for chosen in groups:
        batch = scoring.collate([examples[index] for index in chosen]).to(runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast(), scoring.running(model):
            scores = scoring.scores(model, batch)
        nll[chosen] = scores.nll.double().cpu().numpy()
        tokens[chosen] = scores.units.cpu().numpy()
        if scores.correct is None:
            judged = False
        else:
            correct[chosen] = scores.correct.cpu().numpy()
        for name, values in scores.further.items():
            column = further.setdefault(name, np.zeros(len(examples)))
            column[chosen] = values.double().cpu().numpy()
    return EvalResult(
        example_ids=tuple(example.id for example in examples),
        nll_E=nll,
        tokens_E=tokens,
        correct_E=correct if judged else None,
        further_E=further,
        unit=scoring.unit,
    )


def _by_tokens(order: Sequence[int], examples: Sequence[Prepared], most: int) -> Iterator[list[int]]:
    """Yield indices of examples, in order, in groups of at most `most` tokens; a longer one alone."""
    group: list[int] = []
    tokens = 0
    for index in order:
        if group and tokens + examples[index].length > most:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += examples[index].length
    yield group


def wants_generation(examples: Sequence[TokenizedExample], config: EvaluationConfig) -> bool:
    """Return whether texts are generated and scored on this split.

    Raises:
        ConfigError: generation is set for plain texts, which have no prompt to continue.
    """
    if any(not example.prompt_length for example in examples):
        if config.generate == "on":
            raise ConfigError("generate=on needs prompts; plain text has none: leave generate out.")
        return False
    if config.generate != "auto":
        return config.generate == "on"
    return has_short_answers(examples, config)


def has_short_answers(examples: Sequence[TokenizedExample], config: EvaluationConfig) -> bool:
    """Return whether most references are so short that exact match is a fair score."""
    lengths = [len(example.input_ids) - example.prompt_length for example in examples]
    short = sum(length <= config.short_answer_tokens for length in lengths)
    return short >= SHARE_OF_SHORT_ANSWERS * len(lengths)


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    *,
    runtime: Runtime,
    batch_size: int,
) -> list[str]:
    """Return the greedy continuation of each prompt, of at most the longest reference's tokens."""
    model.eval()
    longest = max(len(example.input_ids) - example.prompt_length for example in examples)
    with runtime.accelerator.autocast():
        return generate(
            model,  # type: ignore[arg-type]
            tokenizer,
            [example.input_ids[: example.prompt_length] for example in examples],
            max_new_tokens=longest,
            batch_size=batch_size,
        )
