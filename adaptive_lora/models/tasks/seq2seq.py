"""Sequence to sequence: an encoder reads the input, a decoder generates the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet, load_examples
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.rows import BadRow
from adaptive_lora.errors import ModelError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.scoring import ExampleScores
from adaptive_lora.models.tasks.padding import right
from adaptive_lora.models.tasks.task import Task, marked
from adaptive_lora.models.tasks.tokens import exact, rouge, token_example_scores, token_losses, token_metrics, with_end
from adaptive_lora.models.tasks.truncation import encode_cut
from adaptive_lora.results import EvalResult
from adaptive_lora.serving import generate_targets
from adaptive_lora.serving.greedy import decoder_start
from adaptive_lora.serving.tokens import known_ids, padding_id

_KNOWN: tuple[tuple[str, str | None, str], ...] = (
    ("input", None, "target"),
    ("source", None, "target"),
    ("document", None, "summary"),
    ("article", None, "highlights"),
    ("text", None, "summary"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputAndTarget:
    """Token ids of an input and of its target."""

    id: str
    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    response: str
    cut: int = 0
    """Number of tokens of both cut off at the model's maximum length."""

    @property
    def length(self) -> int:
        """Number of tokens of input and target."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens of the target."""
        return len(self.target_ids)

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return the result of tokenisation."""
        ids = {"input_ids": self.input_ids, "target_ids": self.target_ids}
        return {**ids, "cut": (self.cut,)}

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Restore a prepared example from the example and its `numbers`."""
        return cls(
            id=example.id,
            response=example.response,
            input_ids=tuple(numbers["input_ids"]),
            target_ids=tuple(numbers["target_ids"]),
            cut=numbers["cut"][0],
        )


class Seq2SeqTask(Task):
    """Cross-entropy over the target's tokens; greedy generation for exact match and ROUGE."""

    name = "seq2seq"
    tokenised = InputAndTarget

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Read start and padding tokens; raise ModelError if the base has none."""
        super().__init__(config, runtime, base)
        self.start = _start(base)
        """Token id at the start of the decoder's input."""
        self.pad = _pad(base)
        """Token id for padding, which is always masked; end-of-text where the tokenizer has none."""

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_examples(config, known=_KNOWN)

    @property
    def served(self) -> dict[str, Any]:
        """Record of the task for adapters: loading of the base, and the maximum length of inputs."""
        return {**super().served, "max_tokens": self.longest}

    def prepare(self, examples: Sequence[Example]) -> tuple[InputAndTarget, ...]:
        """Return inputs and targets tokenised separately, each cut at the maximum length."""
        tokenizer, most = self.base.tokenizer, self.longest
        encoded, lost = encode_cut(tokenizer, [example.prompt for example in examples], most)
        texts = [example.response for example in examples]
        targets = tokenizer(text_target=texts, verbose=False)["input_ids"]
        end, made = tokenizer.eos_token_id, []
        for example, ids, gone, target in zip(examples, encoded["input_ids"], lost, targets, strict=True):
            whole = with_end(target, end, len(target) + 1)
            kept = whole[:most]
            if not ids or not kept:
                raise BadRow(example.where, "no token in its input or target")
            cut = gone + len(whole) - len(kept)
            numbers = {"input_ids": ids, "target_ids": kept, "cut": [cut]}
            made.append(InputAndTarget.of(example, numbers))
        return tuple(made)

    def illustrated(self, item: InputAndTarget, example: Example) -> str:
        return f"{self.decoded(item.input_ids)} -> {marked(self.decoded(item.target_ids))}"

    def collate(self, examples: Sequence[InputAndTarget]) -> Batch:
        """Return inputs and targets padded; the decoder's input is the target shifted by one."""
        pad = self.pad
        targets = [example.target_ids for example in examples]
        lengths = [len(example.input_ids) for example in examples]
        return Batch(
            inputs={
                "input_ids": right([example.input_ids for example in examples], pad),
                "attention_mask": right([[1] * length for length in lengths], 0),
                "decoder_input_ids": right([[self.start, *ids[:-1]] for ids in targets], pad),
                "decoder_attention_mask": right([[1] * len(ids) for ids in targets], 0),
            },
            labels=right(targets, IGNORED),
            padding={"input_ids": pad, "decoder_input_ids": pad},
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_losses(_logits(model, batch), batch.labels).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return token_example_scores(_logits(model, batch), batch.labels)

    def outputs(self, model: nn.Module, examples: Sequence[InputAndTarget]) -> torch.Tensor:
        """Return the logits of each target's first token, each example run alone."""
        batches = [self.collate([example]).to(self.runtime.device) for example in examples]
        return torch.stack([_logits(model, batch)[0, 0].float() for batch in batches])

    def score(self, model: nn.Module, examples: Sequence[InputAndTarget]) -> EvalResult:
        """Score likelihood and, unless switched off, greedy generation."""
        result = self.losses(model, examples)
        if self.config.evaluation.generate == "off":
            return result
        with self.runtime.accelerator.autocast():
            texts = generate_targets(
                model,
                self.base.tokenizer,
                [example.input_ids for example in examples],
                max_new_tokens=max(len(example.target_ids) for example in examples),
                batch_size=self.config.evaluation.eval_batch_size,
            )
        return dataclasses.replace(
            result,
            exact_match_E=exact(texts, examples, self.tokenizer, (each.target_ids for each in examples)),
            further_E=rouge(texts, examples),
        )

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        return {**super().metrics(result), **token_metrics(result)}


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return logits of the target's tokens, shape (B, T, V)."""
    logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
    return logits


def _pad(base: BaseModel) -> int:
    found = padding_id(base.tokenizer, known_ids(base.model))
    if found is None:
        raise ModelError(
            f"the tokenizer of base {base.reference.name} has neither a pad nor an end-of-text "
            "token that the base has an embedding for; one is required."
        )
    return found


def _start(base: BaseModel) -> int:
    found = decoder_start(base.model)
    if found is None:
        raise ModelError(
            f"base {base.reference.name} has no decoder_start_token_id; required in its "
            "config.json or generation_config.json."
        )
    return found
