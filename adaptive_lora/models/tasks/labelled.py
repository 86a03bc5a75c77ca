"""Tasks with one target per example: classes of texts and images, and numbers for texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.images import load_classes
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.data.sequences import batched
from adaptive_lora.errors import ModelError
from adaptive_lora.models.kernels import padding_problem
from adaptive_lora.models.tasks.encoding import encode_cut, padded
from adaptive_lora.models.tasks.scores import ExampleScores, class_scores, correlations
from adaptive_lora.models.tasks.task import PreparedExample, Task, marked
from adaptive_lora.results import PREDICTION, EvalResult
from adaptive_lora.serving import open_image


class _LabelledTask(Task):
    """Base class of tasks whose model has a head over the whole example."""

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        return _logits(model, self.collate(examples).to(self.runtime.device))


class _TextTask(_LabelledTask):
    """Base class of tasks on a text or a pair of texts."""

    tokenised = PreparedExample
    cuts_served_texts = True

    def require_usable(self) -> None:
        name, tokenizer = self.base.reference.name, self.base.tokenizer
        if tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of base {name} has no pad token; one is required.")
        if "pad_token_id" not in self.base.task:
            return
        with self.runtime.autocast():
            problem = padding_problem(self.base.model)
        if problem is not None:
            raise ModelError(
                f"base {name} ({type(self.base.model).__name__}) cannot be used for {self.name}: "
                f"{problem}; required one whose outputs do not change with padding on the right."
            )

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        """Yield examples tokenised, with texts cut at the model's maximum length."""
        pairs = any(example.second is not None for example in examples)
        for items in batched(examples):
            encoded, lost = encode_cut(
                self.base.tokenizer,
                [item.prompt for item in items],
                self.longest,
                [item.second for item in items] if pairs else None,
            )
            encoded.pop("attention_mask", None)
            for i, item in enumerate(items):
                yield PreparedExample.of(item, {**{name: rows[i] for name, rows in encoded.items()}, "cut": [lost[i]]})

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        return f"{self.decoded(item.input_ids)} -> {marked(example.response)}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        pad = {"input_ids": int(self.base.tokenizer.pad_token_id)}
        inputs = padded([example.inputs for example in examples], pad)
        return Batch(inputs=inputs, labels=self.labels([example.target for example in examples]), padding=pad)

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        """Return targets as labels of a batch."""
        raise NotImplementedError


class _ClassTask(_LabelledTask):
    """Base class of classification: cross-entropy over classes."""

    unit = "nats per example"

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(_logits(model, batch), batch.labels, reduction="sum")

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        logits = _logits(model, batch)
        predicted = logits.argmax(dim=-1)
        return ExampleScores(
            nll=functional.cross_entropy(logits, batch.labels, reduction="none"),
            units=torch.ones_like(batch.labels),
            correct=(predicted == batch.labels).long(),
            further={PREDICTION: predicted},
        )

    def losses(self, model: nn.Module, examples: Sequence[PreparedExample]) -> EvalResult:
        """Score examples, and the whole split by accuracy, F1 and Matthews' coefficient."""
        result = super().losses(model, examples)
        targets = [int(example.target) for example in examples]
        predicted = result.further_E[PREDICTION].astype(int).tolist()
        return dataclasses.replace(result, overall=class_scores(targets, predicted))


class ClassificationTask(_ClassTask, _TextTask):
    """One of several classes for a text or a pair of texts."""

    name = "classification"

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_labelled(config, numbers=False)

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        return torch.tensor(targets).long()


class ImageClassificationTask(_ClassTask):
    """One of several classes for an image."""

    name = "image_classification"
    tokenised = PreparedExample

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_classes(config)

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        return (PreparedExample.of(example, {}) for example in examples)

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        return f"{example.prompt} -> {marked(example.response)}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        images = [open_image(example.image) for example in examples]
        pixels = self.base.tokenizer(images=images, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([int(example.target) for example in examples])
        return Batch(inputs={"pixel_values": pixels}, labels=labels)


class RegressionTask(_TextTask):
    """A number for a text or a pair of texts: squared error, in the square of the target's own unit."""

    name = "regression"
    unit = "squared error per example"

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_labelled(config, numbers=True)

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        return torch.tensor(targets, dtype=torch.float32)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return (_logits(model, batch).squeeze(-1) - batch.labels).square().sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        predicted = _logits(model, batch).squeeze(-1)
        return ExampleScores(
            nll=(predicted - batch.labels).square(),
            units=torch.ones_like(batch.labels, dtype=torch.long),
            correct=None,
            further={PREDICTION: predicted},
        )

    def losses(self, model: nn.Module, examples: Sequence[PreparedExample]) -> EvalResult:
        result = super().losses(model, examples)
        targets = np.array([example.target for example in examples])
        return dataclasses.replace(result, overall=correlations(targets, result.further_E[PREDICTION]))


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the outputs of a model with a head in float32, shape (B, classes)."""
    logits: torch.Tensor = model(**batch.inputs).logits.float()
    return logits
