"""Vision and language: answering a question about an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.images import load_questions
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.tokens import NO_ROOM
from adaptive_lora.models.losses import token_losses
from adaptive_lora.models.tasks.encoding import padded, with_end
from adaptive_lora.models.tasks.scores import ExampleScores, token_example_scores
from adaptive_lora.models.tasks.task import PreparedExample, Task, marked
from adaptive_lora.serving import open_image
from adaptive_lora.serving.greedy import filled
from adaptive_lora.serving.images import (
    answer_ids,
    answer_questions,
    answer_type,
    as_patches,
    inputs_of,
    joined_images,
    split_inputs,
)
from adaptive_lora.serving.tokens import known_ids, padding_id


class VisionLanguageTask(Task):
    """Cross-entropy over the answer's tokens; greedy generation for exact match."""

    name = "vision_language"
    tokenised = PreparedExample

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_questions(config)

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        return map(self._prepared, examples)

    def _prepared(self, example: Example) -> PreparedExample:
        processor, image = self.base.tokenizer, example.image or b""
        question = example.question or ""
        try:
            tokens, _ = split_inputs(inputs_of(processor, (question, open_image(image))))
        except ValueError as error:
            reason = "pictures or questions that the base's processor refuses"
            raise BadRow(example.where, str(error), reason=reason) from error
        asked = len(tokens["input_ids"])
        ids = answer_ids(processor, question, example.response)
        whole = with_end(ids, processor.tokenizer.eos_token_id)
        answer = whole[: max(0, self.longest - asked)]
        if not answer:
            raise BadRow(
                example.where,
                f"no supervised token, because picture and question take {asked} of max_tokens="
                f"{self.longest}; raise max_tokens",
                reason=NO_ROOM,
            )
        added = {"input_ids": answer, "token_type_ids": (answer_type(self.base.model.config),) * len(answer)}
        inputs = {name: (*values, *added.get(name, (0,) * len(answer))) for name, values in tokens.items()}
        return PreparedExample.of(example, {**inputs, "places": [asked], "cut": [len(whole) - len(answer)]})

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        return f"{example.prompt}: {item.question} {marked(self.decoded(self.answer_ids(item)))}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        """Return questions with answers, padded, and their images."""
        pad = {"input_ids": padding_id(self.tokenizer, known_ids(self.base.model)) or 0}
        labels = [[IGNORED] * (each.first_label or 0) + [*self.answer_ids(each)] for each in examples]
        shown = [
            split_inputs(inputs_of(self.base.tokenizer, (each.question, open_image(each.image))))[1]
            for each in examples
        ]
        return Batch(
            inputs={**padded([each.inputs for each in examples], pad), **joined_images(shown)},
            labels=filled(labels, IGNORED),
            padding=pad,
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_losses(_logits(model, batch), batch.labels[:, 1:]).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return token_example_scores(_logits(model, batch), batch.labels[:, 1:])

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        """Return the logits of each answer's first token, each example run alone."""
        rows = []
        for example in examples:
            batch = self.collate([example]).to(self.runtime.device)
            rows.append(_logits(model, batch)[0, -example.supervised_tokens].float())
        return torch.stack(rows)

    def generated(self, model: nn.Module, examples: Sequence[PreparedExample]) -> list[str]:
        return answer_questions(
            model,
            self.base.tokenizer,
            [(example.question, open_image(example.image)) for example in examples],
            max_new_tokens=max(example.supervised_tokens for example in examples),
            batch_size=self.config.evaluation.eval_batch_size,
        )

    def answer_ids(self, example: PreparedExample) -> Sequence[int]:
        return example.input_ids[example.first_label :]


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return logits of each next token, shape (B, T - 1, V)."""
    logits: torch.Tensor = model(**as_patches(batch.inputs), use_cache=False).logits
    return logits[:, :-1]
