"""Vision and language: answering a question about an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.images import load_questions
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.tokens import NO_ROOM
from adaptive_lora.models.scoring import ExampleScores
from adaptive_lora.models.tasks.padding import padded, right
from adaptive_lora.models.tasks.task import Task, marked
from adaptive_lora.models.tasks.tokens import exact, token_example_scores, token_losses, token_metrics, with_end
from adaptive_lora.results import EvalResult
from adaptive_lora.serving import open_image
from adaptive_lora.serving.images import answer_ids, answer_questions, inputs_of, joined_images, split_inputs
from adaptive_lora.serving.tokens import known_ids, padding_id


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionAndAnswer:
    """Tokens of a question about an image and of its answer, and the content of the image file."""

    id: str
    image: bytes
    question: str
    response: str
    inputs: Mapping[str, tuple[int, ...]]
    """Name of an input -> one integer per token of question and answer."""
    first_label: int
    """Index of the answer's first token."""
    cut: int = 0
    """Number of the answer's tokens cut off by max_tokens."""

    @property
    def length(self) -> int:
        """Number of tokens in the language model, including those of the image."""
        return len(self.inputs["input_ids"])

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens of the answer."""
        return self.length - self.first_label

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return the tokens, and the start of the answer."""
        return {**self.inputs, "places": (self.first_label,)}


class VisionLanguageTask(Task):
    """Cross-entropy over the answer's tokens; greedy generation for exact match."""

    name = "vision_language"

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_questions(config)

    def prepare(self, examples: Sequence[Example]) -> tuple[QuestionAndAnswer, ...]:
        return tuple(self._prepared(example) for example in examples)

    def _prepared(self, example: Example) -> QuestionAndAnswer:
        processor, image = self.base.tokenizer, example.image or b""
        question = example.question or ""
        try:
            tokens, _ = split_inputs(inputs_of(processor, (question, open_image(image))))
        except ValueError as error:
            reason = "pictures or questions that the base's processor refuses"
            raise BadRow(example.where, str(error), reason=reason) from error
        asked = len(tokens["input_ids"])
        end = processor.tokenizer.eos_token_id
        ids = answer_ids(processor, question, example.response)
        whole = with_end(ids, end, len(ids) + 1)
        answer = whole[: max(0, self.longest - asked)]
        if not answer:
            raise BadRow(
                example.where,
                f"no supervised token, because picture and question take {asked} of max_tokens="
                f"{self.longest}; raise max_tokens",
                reason=NO_ROOM,
            )
        added = {"input_ids": answer}
        return QuestionAndAnswer(
            id=example.id,
            image=image,
            question=question,
            response=example.response,
            inputs={name: (*values, *added.get(name, (0,) * len(answer))) for name, values in tokens.items()},
            first_label=asked,
            cut=len(whole) - len(answer),
        )

    def illustrated(self, item: QuestionAndAnswer, example: Example) -> str:
        answer = item.inputs["input_ids"][item.first_label :]
        shown = marked(self.decoded(answer))
        return f"{example.prompt}: {item.question} {shown}"

    def collate(self, examples: Sequence[QuestionAndAnswer]) -> Batch:
        """Return questions with answers, padded, and their images."""
        pad = self._pad()
        labels = [[IGNORED] * each.first_label + [*each.inputs["input_ids"][each.first_label :]] for each in examples]
        shown = [
            split_inputs(inputs_of(self.base.tokenizer, (each.question, open_image(each.image))))[1]
            for each in examples
        ]
        return Batch(
            inputs={**padded([each.inputs for each in examples], pad), **joined_images(shown)},
            labels=right(labels, IGNORED),
            padding=pad,
        )

    def _pad(self) -> dict[str, int]:
        return {"input_ids": padding_id(self.tokenizer, known_ids(self.base.model)) or 0}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_losses(_logits(model, batch), batch.labels[:, 1:]).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return token_example_scores(_logits(model, batch), batch.labels[:, 1:])

    def outputs(self, model: nn.Module, examples: Sequence[QuestionAndAnswer]) -> torch.Tensor:
        """Return the logits of each answer's first token, each example run alone."""
        rows = []
        for example in examples:
            batch = self.collate([example]).to(self.runtime.device)
            rows.append(_logits(model, batch)[0, example.first_label - 1].float())
        return torch.stack(rows)

    def score(self, model: nn.Module, examples: Sequence[QuestionAndAnswer]) -> EvalResult:
        """Score likelihood and, unless switched off, greedy generation."""
        result = self.losses(model, examples)
        if self.config.evaluation.generate == "off":
            return result
        with self.runtime.accelerator.autocast():
            texts = answer_questions(
                model,
                self.base.tokenizer,
                [(example.question, open_image(example.image)) for example in examples],
                max_new_tokens=max(example.supervised_tokens for example in examples),
                batch_size=self.config.evaluation.eval_batch_size,
            )
        answers = (each.inputs["input_ids"][each.first_label :] for each in examples)
        found = exact(texts, examples, self.tokenizer, answers)
        return dataclasses.replace(result, exact_match_E=found)

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        return {**super().metrics(result), **token_metrics(result)}


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return logits of each next token, shape (B, T - 1, V)."""
    logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
    return logits[:, :-1]
