"""Causal language modelling: continuing a prompt with its response."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adaptive_lora.config import DataConfig, EvaluationConfig
from adaptive_lora.data import Batch, Example, ExampleSet, TokenizedExample, collate, load_examples, unpadded
from adaptive_lora.data.tokens import tokenized
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.kernels import (
    attends_packed,
    causality_problem,
    has_prompt,
    is_invoked,
    packed_attention,
    packed_nll,
    packed_scores,
    packing_problem,
)
from adaptive_lora.models.losses import causal_loss, predict, token_losses
from adaptive_lora.models.tasks.scores import ExampleScores, text_scores, token_example_scores
from adaptive_lora.models.tasks.task import Task, marked
from adaptive_lora.results import FloatArray
from adaptive_lora.serving import generate
from adaptive_lora.serving.tokens import known_ids, padding_id

SHARE_OF_SHORT_ANSWERS = 0.9
"""Minimum share of short responses for which `generate: auto` scores exact match."""


class CausalTask(Task):
    """Next-token prediction over the response, or over prompt and response."""

    name = "causal"
    tokenised = TokenizedExample

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_examples(config)

    @cached_property
    def pad_id(self) -> int:
        """Token id for padding, which is always masked; end-of-text where the tokenizer has none."""
        pad = padding_id(self.tokenizer, known_ids(self.base.model))
        return 0 if pad is None else pad

    def require_usable(self) -> None:
        model = self.base.model
        with model_errors(f"base {self.base.reference.name} does not run", model), self.runtime.accelerator.autocast():
            problem = causality_problem(model)
        if problem is not None:
            raise ModelError(
                f"base {self.base.reference.name} ({type(model).__name__}) is no causal "
                f"language model: {problem}; required one whose tokens see only earlier tokens."
            )

    @property
    def longest(self) -> int:
        """Maximum number of tokens of an example: limited by the study and by the base's positions."""
        allowed, most = self.config.data.max_tokens, self.base.max_positions
        return allowed if most is None else min(allowed, most)

    def prepare(self, examples: Sequence[Example]) -> Iterable[TokenizedExample]:
        return tokenized(examples, self.base.tokenizer, max_tokens=self.longest, loss_on=self.config.data.loss_on)

    def illustrated(self, item: TokenizedExample, example: Example) -> str:
        ends = [item.first_label, *chain.from_iterable(item.gaps), item.length]
        learned = [item.input_ids[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
        between = [item.input_ids[a:b] for a, b in zip([0, *ends[1:-1:2]], ends[::2], strict=True)]
        pairs = zip(between, learned, strict=True)
        return "".join(f"{self.decoded(a)}{marked(self.decoded(b))}" for a, b in pairs)

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        return collate(examples, self.pad_id)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return causal_loss(model, batch)

    def losses_by_example(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if not attends_packed(model):
            found = predict(model, batch)
            return token_losses(found.logits, found.targets).sum(dim=1)
        nll, owners = packed_nll(model, unpadded(batch))
        return nll.new_zeros(batch.examples).index_add(0, owners, nll)

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        with super().running(model):
            if not self.packs(model):
                yield
            else:
                with packed_attention(model):
                    yield

    def packs(self, model: nn.Module) -> bool:
        return self._base_packs and not (has_prompt(model) or is_invoked(model))

    @cached_property
    def _base_packs(self) -> bool:
        """Layout of batches: packed rows if true, as set in the study and supported by the base.

        Raises:
            ConfigError: the study sets packed and the base does not support it.
        """
        sharded, wanted = self.runtime.processes.sharded, self.config.train.batching
        if sharded and wanted == "packed":
            raise ConfigError(
                "batching: the kernels of packed rows read weights outside the model's own forward pass, which alone "
                "gathers those that FSDP2 divides. Set batching to auto or padded."
            )
        if sharded:
            return False
        problem = None if wanted == "padded" else packing_problem(self.base.model)
        if problem is None:
            return wanted != "padded"
        kind = type(self.base.model).__name__
        if wanted == "packed":
            raise ConfigError(f"batching: {kind} cannot run on packed rows: {problem}. Set batching to auto or padded.")
        logging.getLogger(__name__).warning("batches of %s are padded: %s", kind, problem)
        return False

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        if attends_packed(model):
            return _packed(model, batch)
        found = predict(model, batch)
        return token_example_scores(found.logits, found.targets)

    def generates(self, examples: Sequence[TokenizedExample]) -> bool:
        return wants_generation(examples, self.config.evaluation)

    def generated(self, model: nn.Module, examples: Sequence[TokenizedExample]) -> list[str]:
        return continuations(
            model,
            self.base.tokenizer,
            examples,
            runtime=self.runtime,
            batch_size=self.config.evaluation.eval_batch_size,
        )

    def answer_ids(self, example: TokenizedExample) -> Sequence[int]:
        return example.input_ids[example.prompt_length :]

    def text_scores(self, texts: Sequence[str], examples: Sequence[TokenizedExample]) -> Mapping[str, FloatArray]:
        """Return ROUGE, chrF and final answers of long answers; exact match alone is enough for short ones."""
        short = has_short_answers(examples, self.config.evaluation)
        return {} if short else text_scores(texts, examples)

    def outputs(self, model: Any, examples: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return last-token logits of the prompts, each run alone, shape (examples, vocabulary)."""
        rows = []
        for example in examples:
            shown = example.input_ids[: max(1, example.prompt_length)]  # plain text has no prompt
            ids = torch.tensor([shown], device=model.device)
            rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1])
        return torch.stack([row.float() for row in rows])


def _packed(model: nn.Module, batch: Batch) -> ExampleScores:
    """Return the scores of a batch's examples, run as one row."""
    found = packed_scores(model, unpadded(batch))
    units = batch.supervised_by_example
    zeros = torch.zeros(batch.examples, device=found.nll.device)
    return ExampleScores(
        nll=zeros.double().index_add(0, found.owners, found.nll.double()),
        units=units,
        correct=zeros.long().index_add(0, found.owners, found.correct.long()),
    )


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
