"""Sequence classification: one of several classes for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.errors import ModelError
from adaptive_lora.models.kernels import padding_problem
from adaptive_lora.models.scoring import ExampleScores, Prepared
from adaptive_lora.models.tasks.class_scores import class_scores
from adaptive_lora.models.tasks.padding import padded
from adaptive_lora.models.tasks.task import Task, marked
from adaptive_lora.models.tasks.truncation import encode_cut
from adaptive_lora.results import PREDICTION, EvalResult

NATS_PER_EXAMPLE = "nats per example"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledText:
    """A tokenised text or pair of texts, with its target."""

    id: str
    inputs: Mapping[str, tuple[int, ...]]
    """Name of a model input -> one integer per token."""
    target: float
    """Target: index of the class, or the number."""
    cut: int = 0
    """Number of tokens cut off at the model's maximum length."""
    supervised_tokens: int = 1
    """Number of predictions: one."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return the result of tokenisation."""
        return {"cut": (self.cut,), **self.inputs}

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Restore a prepared text from the example and its `numbers`."""
        inputs = {name: tuple(values) for name, values in numbers.items() if name != "cut"}
        target = float(example.target or 0.0)
        return cls(id=example.id, inputs=inputs, target=target, cut=numbers["cut"][0])


class TextTask(Task):
    """Base class of classification and regression, with their inputs and outputs."""

    tokenised = LabelledText

    def require_usable(self) -> None:
        name, tokenizer = self.base.reference.name, self.base.tokenizer
        if tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of base {name} has no pad token; one is required.")
        if "pad_token_id" not in self.base.task:
            return
        with self.runtime.accelerator.autocast():
            problem = padding_problem(self.base.model)
        if problem is not None:
            raise ModelError(
                f"base {name} ({type(self.base.model).__name__}) cannot be used for {self.name}: "
                f"{problem}; required one whose outputs do not change with padding on the right."
            )

    def prepare(self, examples: Sequence[Example]) -> tuple[LabelledText, ...]:
        """Return examples tokenised, with texts cut at the model's maximum length."""
        second = [example.second for example in examples]
        encoded, lost = encode_cut(
            self.base.tokenizer,
            [example.prompt for example in examples],
            self.longest,
            second if any(text is not None for text in second) else None,
        )
        names = [name for name in encoded if name != "attention_mask"]
        return tuple(
            LabelledText.of(example, {"cut": [lost[i]], **{name: encoded[name][i] for name in names}})
            for i, example in enumerate(examples)
        )

    def collate(self, examples: Sequence[LabelledText]) -> Batch:
        pad = {"input_ids": int(self.base.tokenizer.pad_token_id)}
        inputs = padded([example.inputs for example in examples], pad)
        targets = [example.target for example in examples]
        return Batch(inputs=inputs, labels=self.labels(targets), padding=pad)

    @property
    def served(self) -> dict[str, Any]:
        """Record of the task for adapters: that of the base, and the maximum length of texts."""
        return {**super().served, "max_tokens": self.longest}

    def illustrated(self, item: LabelledText, example: Example) -> str:
        return f"{self.decoded(item.inputs['input_ids'])} -> {marked(example.response)}"

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        """Return targets as labels of a batch."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, examples: Sequence[LabelledText]) -> torch.Tensor:
        batch = self.collate(examples).to(self.runtime.device)
        return logits_of(model, batch)


class ClassificationTask(TextTask):
    """Cross-entropy over classes."""

    name = "classification"
    unit = NATS_PER_EXAMPLE

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_labelled(config, numbers=False)

    @classmethod
    def record(cls, data: ExampleSet) -> dict[str, Any]:
        return {"name": cls.name, "labels": list(data.labels)}

    @property
    def served(self) -> dict[str, Any]:
        """Record of the task for adapters: that of the base, and the maximum length of texts."""
        return {**super().served, "max_tokens": self.longest}

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        return torch.tensor(targets).long()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(logits_of(model, batch), batch.labels, reduction="sum")

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return class_example_scores(logits_of(model, batch), batch.labels)

    def losses(self, model: nn.Module, examples: Sequence[Prepared]) -> EvalResult:
        return with_class_scores(super().losses(model, examples), examples)


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Return the outputs of a model with a head in float32, shape (B, classes)."""
    logits: torch.Tensor = model(**batch.inputs).logits.float()
    return logits


def class_example_scores(logits: torch.Tensor, labels: torch.Tensor) -> ExampleScores:
    """Return loss, correctness and predicted class of each example."""
    predicted = logits.argmax(dim=-1)
    return ExampleScores(
        nll=functional.cross_entropy(logits, labels, reduction="none"),
        units=torch.ones_like(labels),
        correct=(predicted == labels).long(),
        further={PREDICTION: predicted},
    )


def with_class_scores(result: EvalResult, examples: Sequence[Any]) -> EvalResult:
    """Add the scores of the whole split: accuracy, F1 and Matthews' coefficient."""
    targets = [int(example.target) for example in examples]
    predicted = result.further_E[PREDICTION].astype(int)
    return dataclasses.replace(result, overall=class_scores(targets, predicted.tolist()))
