"""Sequence to sequence: an encoder reads the input, a decoder generates the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet, load_examples
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.sequences import batched
from adaptive_lora.errors import ModelError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.losses import token_losses
from adaptive_lora.models.tasks.encoding import encode_cut, with_end
from adaptive_lora.models.tasks.scores import ExampleScores, rouge, token_example_scores
from adaptive_lora.models.tasks.task import PreparedExample, Task, marked
from adaptive_lora.results import FloatArray
from adaptive_lora.serving import generate_targets
from adaptive_lora.serving.greedy import decoder_start, filled, mask_of
from adaptive_lora.serving.tokens import known_ids, padding_id

_KNOWN: tuple[tuple[str, str | None, str], ...] = (
    ("input", None, "target"),
    ("source", None, "target"),
    ("document", None, "summary"),
    ("article", None, "highlights"),
    ("text", None, "summary"),
)


class Seq2SeqTask(Task):
    """Cross-entropy over the target's tokens; greedy generation for exact match and ROUGE."""

    name = "seq2seq"
    tokenised = PreparedExample
    cuts_served_texts = True

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Read start and padding tokens; raise ModelError if the base has none."""
        super().__init__(config, runtime, base)
        self.start = _start(base)
        """Token id at the start of the decoder's input."""
        self.pad = _pad(base, self.tokenizer)
        """Token id for padding, which is always masked; end-of-text where the tokenizer has none."""

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_examples(config, known=_KNOWN)

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        """Yield inputs and targets tokenised separately, each cut at the maximum length."""
        tokenizer, most = self.base.tokenizer, self.longest
        for items in batched(examples):
            encoded, lost = encode_cut(tokenizer, [item.prompt for item in items], most)
            targets = tokenizer(text_target=[item.response for item in items], verbose=False)["input_ids"]
            for item, ids, gone, target in zip(items, encoded["input_ids"], lost, targets, strict=True):
                whole = with_end(target, tokenizer.eos_token_id)
                kept = whole[:most]
                if not ids or not kept:
                    raise BadRow(item.where, "no token in its input or target")
                cut = gone + len(whole) - len(kept)
                yield PreparedExample.of(item, {"input_ids": ids, "target_ids": kept, "cut": [cut]})

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        return f"{self.decoded(item.input_ids)} -> {marked(self.decoded(self.answer_ids(item)))}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        """Return inputs and targets padded; the decoder's input is the target shifted by one."""
        ids = [example.input_ids for example in examples]
        targets = [example.inputs["target_ids"] for example in examples]
        return Batch(
            inputs={
                "input_ids": filled(ids, self.pad),
                "attention_mask": mask_of(ids),
                "decoder_input_ids": filled([[self.start, *target[:-1]] for target in targets], self.pad),
                "decoder_attention_mask": mask_of(targets),
            },
            labels=filled(targets, IGNORED),
            padding={"input_ids": self.pad, "decoder_input_ids": self.pad},
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_losses(self.logits(model, batch), batch.labels).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        return token_example_scores(self.logits(model, batch), batch.labels)

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        """Return the logits of each target's first token, each example run alone."""
        batches = [self.collate([example]).to(self.runtime.device) for example in examples]
        return torch.stack([self.logits(model, batch)[0, 0].float() for batch in batches])

    def generated(self, model: nn.Module, examples: Sequence[PreparedExample]) -> list[str]:
        return generate_targets(
            model,
            self.base.tokenizer,
            [example.input_ids for example in examples],
            max_new_tokens=max(example.supervised_tokens for example in examples),
            batch_size=self.config.evaluation.eval_batch_size,
        )

    def answer_ids(self, example: PreparedExample) -> Sequence[int]:
        return example.inputs["target_ids"]

    def text_scores(self, texts: Sequence[str], examples: Sequence[PreparedExample]) -> Mapping[str, FloatArray]:
        return rouge(texts, examples)

    @staticmethod
    def logits(model: Any, batch: Batch) -> torch.Tensor:
        """Return logits of the target's tokens, shape (B, T, V)."""
        logits: torch.Tensor = model(**batch.inputs, use_cache=False).logits
        return logits


def _pad(base: BaseModel, tokenizer: Any) -> int:
    found = padding_id(tokenizer, known_ids(base.model))
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
