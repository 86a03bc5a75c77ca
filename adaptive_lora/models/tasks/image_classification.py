"""Image classification: one of several classes for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.images import load_classes
from adaptive_lora.models.scoring import ExampleScores, Prepared
from adaptive_lora.models.tasks.classification import (
    NATS_PER_EXAMPLE,
    class_example_scores,
    logits_of,
    with_class_scores,
)
from adaptive_lora.models.tasks.task import Task, marked
from adaptive_lora.results import EvalResult
from adaptive_lora.serving import open_image


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """An image file's content and its class; the image is decoded for each batch."""

    id: str
    image: bytes
    target: float
    """Index of the class."""
    length: int = 1
    supervised_tokens: int = 1

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return an empty mapping, because there is no text."""
        return {}


class ImageClassificationTask(Task):
    """Cross-entropy over classes."""

    name = "image_classification"
    unit = NATS_PER_EXAMPLE

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_classes(config)

    @classmethod
    def record(cls, data: ExampleSet) -> dict[str, Any]:
        return {"name": cls.name, "labels": list(data.labels)}

    def prepare(self, examples: Sequence[Example]) -> tuple[LabelledImage, ...]:
        return tuple(
            LabelledImage(id=each.id, image=each.image or b"", target=float(each.target or 0)) for each in examples
        )

    def illustrated(self, item: LabelledImage, example: Example) -> str:
        return f"{example.prompt} -> {marked(example.response)}"

    def collate(self, examples: Sequence[LabelledImage]) -> Batch:
        images = [open_image(example.image) for example in examples]
        pixels = self.base.tokenizer(images=images, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([int(example.target) for example in examples])
        return Batch(inputs={"pixel_values": pixels}, labels=labels)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(logits_of(model, batch), batch.labels, reduction="sum")

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return class_example_scores(logits_of(model, batch), batch.labels)

    def outputs(self, model: nn.Module, examples: Sequence[LabelledImage]) -> torch.Tensor:
        return logits_of(model, self.collate(examples).to(self.runtime.device))

    def losses(self, model: nn.Module, examples: Sequence[Prepared]) -> EvalResult:
        return with_class_scores(super().losses(model, examples), examples)
