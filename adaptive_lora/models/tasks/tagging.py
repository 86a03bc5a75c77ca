"""Token classification: a tag for each word of a text, as in named entity recognition."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.sequences import batched
from adaptive_lora.data.tagged import load_tagged
from adaptive_lora.errors import ModelError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.losses import token_losses
from adaptive_lora.models.tasks.encoding import padded
from adaptive_lora.models.tasks.scores import ExampleScores, token_example_scores
from adaptive_lora.models.tasks.task import PreparedExample, Task, marked
from adaptive_lora.results import EvalResult
from adaptive_lora.serving.words import encode_words

_ENTITY = re.compile(r"O|[BIESLU]-.+")
"""Form of the tags of entities: outside, or their place in an entity and its type."""
_COUNTS = ("entities", "entities_predicted", "entities_right")


class TokenClassificationTask(Task):
    """Cross-entropy over the tags of words, each at the word's first token; F1 of entities."""

    name = "token_classification"
    tokenised = PreparedExample
    unit = "nats per word"
    cuts_served_texts = True

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Refuse a tokenizer without padding."""
        super().__init__(config, runtime, base)
        self.labels: Sequence[str] = base.task["labels"]
        """Names of the tags in the order of their indices."""
        self.has_entities = all(map(_ENTITY.fullmatch, self.labels))
        """Mark of tags of entities; of others, such as parts of speech, accuracy alone is scored."""
        if base.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of base {base.reference.name} has no pad token; one is required.")

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_tagged(config)

    @property
    def made_from(self) -> Mapping[str, Any]:
        return {"labels": list(self.labels)}

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        """Yield texts tokenised as a whole, cut at the model's maximum length with the tags of what is cut."""
        index = {label: at for at, label in enumerate(self.labels)}
        for items in batched(examples):
            encoded = encode_words(self.base.tokenizer, [item.prompt.split(" ") for item in items], self.longest)
            for item in items:
                try:
                    found = next(encoded)
                except ValueError as error:
                    raise BadRow(item.where, str(error), reason="words without a token of their own") from error
                tags = [index[tag] for tag in item.response.split(" ")][: len(found.places)]
                if not tags:
                    raise BadRow(item.where, f"no word within max_tokens={self.longest}")
                numbers = {"input_ids": found.ids, "word_places": found.places, "tags": tags, "cut": [found.lost]}
                yield PreparedExample.of(item, numbers)

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        pairs = zip(example.prompt.split(" "), item.inputs["tags"], strict=False)
        return " ".join(f"{word} {marked(self.labels[tag])}" for word, tag in pairs)

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        pad = {"input_ids": int(self.base.tokenizer.pad_token_id)}
        inputs = padded([{"input_ids": example.input_ids} for example in examples], pad)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, example in enumerate(examples):
            labels[row, list(example.inputs["word_places"])] = torch.tensor(example.inputs["tags"])
        return Batch(inputs=inputs, labels=labels, padding=pad)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_losses(_logits(model, batch), batch.labels).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        logits = _logits(model, batch)
        found = token_example_scores(logits, batch.labels)
        if not self.has_entities:
            return found
        pairs = zip(batch.labels.cpu(), logits.argmax(dim=-1).cpu(), strict=True)
        counts = [self._entities(labels, predicted) for labels, predicted in pairs]
        columns = torch.tensor(counts, dtype=torch.double).T
        return dataclasses.replace(found, further=dict(zip(_COUNTS, columns, strict=True)))

    def _entities(self, labels: torch.Tensor, predicted: torch.Tensor) -> tuple[int, int, int]:
        """Return the number of entities of one text, of predicted ones, and of those among them that are right."""
        from seqeval.metrics.sequence_labeling import get_entities

        words = labels != IGNORED
        true, found = (
            set(get_entities([self.labels[tag] for tag in tags[words].tolist()])) for tags in (labels, predicted)
        )
        return len(true), len(found), len(true & found)

    def losses(self, model: nn.Module, examples: Sequence[PreparedExample]) -> EvalResult:
        """Score texts, and the whole split by the accuracy of words and, of entities, precision, recall and F1."""
        result = super().losses(model, examples)
        overall = {"accuracy": float(result.token_accuracy or 0.0)}
        if self.has_entities:
            true, predicted, right = (float(result.further_E[name].sum()) for name in _COUNTS)
            overall |= {
                "precision": right / predicted if predicted else 0.0,
                "recall": right / true if true else 0.0,
                "f1": 2 * right / (true + predicted) if true + predicted else 0.0,
            }
        return dataclasses.replace(result, further_E={}, overall=overall)

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        """Return the logits of each word, shape (words, tags)."""
        batch = self.collate(examples).to(self.runtime.device)
        return _logits(model, batch)[batch.supervised]


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the outputs of the head at each token in float32, shape (B, T, tags)."""
    logits: torch.Tensor = model(**batch.inputs).logits.float()
    return logits
