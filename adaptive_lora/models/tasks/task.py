"""The interface of a task: loading of the base, preparation of rows, loss and scores."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import ProcessorMixin

from adaptive_lora import serving
from adaptive_lora.allocation import Plan
from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet, Tokenised, TokenizedExample, cached_tokens
from adaptive_lora.data.examples import MediaFile
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.token_cache import asks_for_the_time, tokenizer_digest
from adaptive_lora.errors import DataError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.kernels import fast_layers
from adaptive_lora.models.losses import LossByExample
from adaptive_lora.models.tasks.scores import ExampleScores, exact
from adaptive_lora.results import NATS_PER_TOKEN, EvalResult, FloatArray
from adaptive_lora.serving.tokens import known_ids, unknown_ids

PROBE_EXAMPLES = 4
_TOKENS_PER_EXAMPLE = 128
"""Number of tokens per example assumed by `eval_batch_size` for packed batches."""
_TEXTS = ("input_ids", "target_ids")
_TARGETS = ("target_ids", "tags")


def marked(text: str) -> str:
    """Return a supervised text in the marks of the data summary."""
    return f"[[{text}]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedExample:
    """An example prepared for its model; fields that its task does not use keep their defaults."""

    id: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name of a text input -> one integer per token; empty without text."""
    media: MediaFile | None = None
    """Image or recording, whose file is read and decoded for each batch; None for other tasks."""
    question: str = ""
    response: str = ""
    target: float = 0.0
    """Index of the class, or the number to predict."""
    first_label: int | None = None
    """Index of the first supervised token, where the input ends with the response."""
    cut: int = 0
    """Number of tokens cut off at the maximum length."""

    @property
    def image(self) -> bytes:
        """Content of the image file; empty for tasks without images."""
        return b"" if self.media is None else self.media.content()

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of the text."""
        return self.inputs["input_ids"]

    @property
    def length(self) -> int:
        """Number of tokens in the model, including those of the target; 1 without text."""
        return sum(len(self.inputs[name]) for name in _TEXTS if name in self.inputs) or 1

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens; 1 where the example is the unit."""
        if self.first_label is not None:
            return self.length - self.first_label
        return next((len(self.inputs[name]) for name in _TARGETS if name in self.inputs), 1)

    @property
    def classes(self) -> Sequence[int]:
        """Indices of its classes: one, or one a word where words have tags; for tasks with classes."""
        return self.inputs.get("tags", (int(self.target),))

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return the result of tokenisation; empty without text."""
        if not self.inputs:
            return {}
        places = {} if self.first_label is None else {"places": (self.first_label,)}
        return {**self.inputs, **places, "cut": (self.cut,)}

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Restore a prepared example from the example and its `numbers`."""
        return cls(
            id=example.id,
            inputs={name: tuple(values) for name, values in numbers.items() if name not in ("places", "cut")},
            media=example.media,
            question=example.question or "",
            response=example.response,
            target=float(example.target or 0.0),
            first_label=numbers["places"][0] if "places" in numbers else None,
            cut=numbers["cut"][0] if "cut" in numbers else 0,
        )


Prepared = TokenizedExample | PreparedExample


class Task(ABC):
    """A task on a base, equal for all methods of a comparison."""

    name: ClassVar[str]
    """Name: key of `TASKS`, and of the specification in serving."""
    unit: ClassVar[str] = NATS_PER_TOKEN
    """Unit of the mean loss, as shown in reports."""
    tokenised: ClassVar[type[Tokenised] | None] = None
    """Type of prepared examples that are an example and integers, which are kept on disk; None for other tasks."""
    cuts_served_texts: ClassVar[bool] = False
    """Mark of a task whose texts are cut at the same length in serving."""
    losses_by_example: LossByExample | None = None
    """Loss of each example, with which several trials can train together; None where the task has none."""

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Make the task from a study's settings and a base loaded for it."""
        self.config, self.runtime, self.base = config, runtime, base

    @property
    def longest(self) -> int:
        """Maximum number of tokens of an example: limited by study, base and tokenizer."""
        limits = (
            self.config.data.max_tokens,
            self.base.max_positions,
            getattr(self.base.tokenizer, "model_max_length", None),
        )
        return min(limit for limit in limits if limit is not None and limit > 0)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the base, also if it is inside a processor."""
        made: Any = self.base.tokenizer
        return made.tokenizer if isinstance(made, ProcessorMixin) else made

    @classmethod
    @abstractmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        """Return the examples of a data configuration.

        Raises:
            DataError: the data cannot be read, a column is missing, or no row is left.
        """

    @classmethod
    def record(cls, data: ExampleSet, config: DataConfig) -> dict[str, Any]:
        """Return the task's settings for loading and serving the base, as JSON-ready values."""
        return {"name": cls.name, **({"labels": list(data.labels)} if data.labels else {})}

    @property
    def served(self) -> dict[str, Any]:
        """Record of the task for adapters: loading of the base, and serving."""
        return {**self.base.task, **({"max_tokens": self.longest} if self.cuts_served_texts else {})}

    def require_usable(self) -> None:  # noqa: B027 - most tasks accept any base that loads
        """Check on the base's device that it computes as the task assumes.

        Raises:
            ModelError: it does not; the message gives the difference.
        """

    @abstractmethod
    def prepare(self, examples: Sequence[Example]) -> Iterable[Any]:
        """Return examples prepared for `collate`, of which only some need be in memory at a time.

        Raises:
            BadRow: an example cannot be used.
        """

    def prepared(self, examples: Sequence[Example]) -> Sequence[Any]:
        """Return a whole data set prepared; cached tokens are read from disk.

        Raises:
            BadRow: an example cannot be used.
        """
        made = self._prepared_once(examples)
        rows = (each.numbers() for each in made)
        texts = (row[name] for row in rows for name in _TEXTS if name in row)
        problem = unknown_ids(self.tokenizer, texts, known_ids(self.base.model))
        if problem is not None:
            raise DataError(
                f"the data's texts do not fit base {self.base.reference.name}: {problem}. Give a "
                "base that has them (model.resize_token_embeddings(len(tokenizer)), trained and "
                "saved with its tokenizer: adapters do not train embeddings), or remove these tokens "
                "from the texts or the tokenizer."
            )
        return made

    @property
    def made_from(self) -> Mapping[str, Any]:
        """Everything else that determines the prepared examples, JSON-ready."""
        return {}

    def _prepared_once(self, examples: Sequence[Example]) -> Sequence[Any]:
        if self.tokenised is None:
            return tuple(self.prepare(examples))
        # The effect of a base's own Python code, or of the time in a template, is not in the
        # tokenizer's rules.
        changing = self.base.reference.trust_remote_code or asks_for_the_time(self.base.tokenizer)
        rules = None if changing else tokenizer_digest(self.base.tokenizer)
        made_from = {
            "task": self.name,
            "tokenizer": rules,
            "max_tokens": self.config.data.max_tokens,
            "max_positions": self.base.max_positions,
            "loss_on": self.config.data.loss_on,
            **self.made_from,
        }
        return cached_tokens(examples, self.tokenised, self.prepare, None if rules is None else made_from)

    def unusable(self, examples: Sequence[Example], start: int = 0) -> dict[int, BadRow]:
        """Return the index, counted from `start`, of each example that `prepare` refuses -> its error.

        The search is by halves, so that the others are not prepared one by one.
        """
        try:
            for _ in self.prepare(examples):
                pass
        except BadRow as row:
            if len(examples) == 1:
                return {start: row}
            half = len(examples) // 2
            return {**self.unusable(examples[:half], start), **self.unusable(examples[half:], start + half)}
        return {}

    def decoded(self, ids: Sequence[int]) -> str:
        """Return token ids as text, including special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    @abstractmethod
    def illustrated(self, item: Any, example: Example) -> str:
        """Return a prepared example as text, with its supervised text marked."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return a batch of prepared examples."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss to minimise, summed over the batch's targets."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Return the scores of each example of a batch."""

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Run a model by fused kernels inside the block, unless the study sets the plain ones.

        Backward passes must be inside the block too.
        """
        if self.config.train.batching == "padded" or self.runtime.processes.sharded:
            yield
        else:
            with fast_layers(model):
                yield

    def packs(self, model: nn.Module) -> bool:
        """Return whether a model runs on packed rows inside `running`."""
        return False

    @abstractmethod
    def outputs(self, model: nn.Module, examples: Sequence[Any]) -> torch.Tensor:
        """Return a model's outputs for a few prepared examples, float32 on the CPU.

        An adapter that was saved and loaded back must give equal outputs.
        """

    def probe(self, model: nn.Module, examples: Sequence[Any]) -> torch.Tensor:
        """Return the outputs for the first examples of a split, without gradients."""
        model.eval()
        with torch.no_grad(), self.runtime.autocast():
            return self.outputs(model, examples[:PROBE_EXAMPLES]).float().cpu()

    def losses(self, model: nn.Module, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples without gradients and without generating; it is left in evaluation mode.

        Examples are batched by length to save padding; their scores are returned in their own order.
        """
        model.eval()
        groups = list(self._groups(model, examples))
        found = self.runtime.processes.divided(lambda chosen: self._scored(model, examples, chosen), groups)
        nll = np.zeros(len(examples))
        tokens, correct = (np.zeros(len(examples), dtype=np.int64) for _ in range(2))
        further: dict[str, FloatArray] = {}
        judged = True
        for chosen, scores in found:
            nll[chosen] = scores.nll.double().numpy()
            tokens[chosen] = scores.units.numpy()
            if scores.correct is None:
                judged = False
            else:
                correct[chosen] = scores.correct.numpy()
            for name, values in scores.further.items():
                column = further.setdefault(name, np.zeros(len(examples)))
                column[chosen] = values.double().numpy()
        return EvalResult(
            example_ids=tuple(example.id for example in examples),
            nll_E=nll,
            tokens_E=tokens,
            correct_E=correct if judged else None,
            further_E=further,
            unit=self.unit,
        )

    def _scored(
        self, model: nn.Module, examples: Sequence[Any], chosen: Sequence[int]
    ) -> tuple[Sequence[int], ExampleScores]:
        """Return the scores of the examples with these indices, on the CPU, with the indices."""
        batch = self.collate([examples[index] for index in chosen]).to(self.runtime.device)
        with torch.no_grad(), self.runtime.autocast(), self.running(model):
            return chosen, self.scores(model, batch).cpu()

    def _groups(self, model: nn.Module, examples: Sequence[Prepared]) -> Iterator[list[int]]:
        """Yield the indices of the examples of each batch, by length.

        A packed batch has a limited number of tokens; a longer example is alone.
        """
        size, packs = self.config.evaluation.eval_batch_size, self.packs(model)
        group: list[int] = []
        tokens, lengths = 0, [example.length for example in examples]
        for index in sorted(range(len(examples)), key=lengths.__getitem__):
            length = lengths[index]
            full = tokens + length > size * _TOKENS_PER_EXAMPLE if packs else len(group) == size
            if group and full:
                yield group
                group, tokens = [], 0
            group.append(index)
            tokens += length
        yield group

    def generates(self, examples: Sequence[Any]) -> bool:
        """Return whether texts are generated and scored on a split."""
        return serving.TASKS[self.name].generates and self.config.evaluation.generate != "off"

    def generated(self, model: nn.Module, examples: Sequence[Any]) -> list[str]:
        """Return the text that a model generates for each example, at most as long as the longest reference."""
        raise NotImplementedError

    def answer_ids(self, example: Any) -> Sequence[int]:
        """Return the token ids of an example's reference."""
        raise NotImplementedError

    def text_scores(self, texts: Sequence[str], examples: Sequence[Any]) -> Mapping[str, FloatArray]:
        """Return the scores of generated texts in addition to exact match."""
        return {}

    def overall_text_scores(self, texts: Sequence[str], examples: Sequence[Any]) -> Mapping[str, float]:
        """Return the scores of all generated texts together, by name."""
        return {}

    def score(self, model: nn.Module, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples by all scores of the task: likelihood and, where asked for, greedy generation."""
        result = self.losses(model, examples)
        if not self.generates(examples):
            return result
        with self.runtime.autocast():
            texts = self.generated(model, examples)
        return dataclasses.replace(
            result,
            exact_match_E=exact(texts, examples, self.tokenizer, map(self.answer_ids, examples)),
            further_E={**result.further_E, **self.text_scores(texts, examples)},
            overall={**result.overall, **self.overall_text_scores(texts, examples)},
        )

    def plan_scores(self, plan: Plan) -> Mapping[str, float]:
        """Return scores of a trial's plan by name, of tasks that know which ranks are right."""
        return {}

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        """Return metric name -> value of a split; tasks over tokens have perplexity and accuracy of tokens."""
        found = {"loss": result.loss, "exact_match": result.exact_match, **result.others}
        if result.perplexity is not None:
            found |= {
                "perplexity": result.perplexity,
                "token_accuracy": result.token_accuracy,
                "supervised_tokens": float(result.tokens_E.sum()),
            }
        return {name: value for name, value in found.items() if value is not None}
