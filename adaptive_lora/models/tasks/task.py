"""The interface of a task: loading of the base, preparation of rows, loss and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import ProcessorMixin

from adaptive_lora.allocation import Plan
from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet, Tokenised, cached_tokens
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.token_cache import asks_for_the_time, tokenizer_digest
from adaptive_lora.errors import DataError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.kernels import fast_layers
from adaptive_lora.models.losses import LossByExample
from adaptive_lora.models.scoring import ExampleScores, Prepared, evaluate
from adaptive_lora.results import NATS_PER_TOKEN, EvalResult
from adaptive_lora.serving.tokens import known_ids, unknown_ids

PROBE_EXAMPLES = 4


def marked(text: str) -> str:
    """Return a supervised text in the marks of the data summary."""
    return f"[[{text}]]"


class Task(ABC):
    """A task on a base, equal for all methods of a comparison."""

    name: ClassVar[str]
    """Name: key of `TASKS`, and of the classes loaded in serving."""
    unit: ClassVar[str] = NATS_PER_TOKEN
    """Unit of the mean loss, as shown in reports."""

    tokenised: ClassVar[type[Tokenised] | None] = None
    """Type of prepared examples that are tokens alone and can be cached on disk; None for other tasks."""

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

    @classmethod
    @abstractmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        """Return the examples of a data configuration.

        Raises:
            DataError: the data cannot be read, a column is missing, or no row is left.
        """

    @property
    def served(self) -> dict[str, Any]:
        """Record of the task for adapters: loading of the base, and serving."""
        return dict(self.base.task)

    @classmethod
    def record(cls, data: ExampleSet) -> dict[str, Any]:
        """Return the task's settings for loading and serving the base, as JSON-ready values."""
        return {"name": cls.name}

    def require_usable(self) -> None:  # noqa: B027 - most tasks accept any base that loads
        """Check on the base's device that it computes as the task assumes.

        Raises:
            ModelError: it does not; the message gives the difference.
        """

    @abstractmethod
    def prepare(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        """Return examples prepared for `collate`; each is a `Prepared`.

        Raises:
            BadRow: an example cannot be used.
        """

    def prepared(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        """Return a whole data set prepared; cached tokens are read from disk.

        Raises:
            BadRow: an example cannot be used.
        """
        made = self._prepared_once(examples)
        problem = unknown_ids(
            self.tokenizer, (ids for each in made for ids in _token_ids(each)), known_ids(self.base.model)
        )
        if problem is not None:
            raise DataError(
                f"the data's texts do not fit base {self.base.reference.name}: {problem}. Give a "
                "base that has them (model.resize_token_embeddings(len(tokenizer)), trained and "
                "saved with its tokenizer: adapters do not train embeddings), or remove these tokens "
                "from the texts or the tokenizer."
            )
        return made

    def _prepared_once(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        kind, trusted = self.tokenised, self.base.reference.trust_remote_code
        # The effect of a base's own Python code, or of the time in a template, is not in the
        # tokenizer's rules.
        changing = trusted or asks_for_the_time(self.base.tokenizer)
        rules = None if kind is None or changing else tokenizer_digest(self.base.tokenizer)
        if kind is None or rules is None:
            return self.prepare(examples)
        data = self.config.data
        made_from = {
            "task": self.name,
            "tokenizer": rules,
            "max_tokens": data.max_tokens,
            "max_positions": self.base.max_positions,
            "loss_on": data.loss_on,
        }
        return cached_tokens(examples, kind, self.prepare, made_from)

    def unusable(self, examples: Sequence[Example]) -> dict[int, BadRow]:
        """Return `id()` of each example that `prepare` refuses -> its error.

        The search is by halves, so that the others are not prepared one by one.
        """
        try:
            self.prepare(examples)
        except BadRow as row:
            if len(examples) == 1:
                return {id(examples[0]): row}
            half = len(examples) // 2
            return {**self.unusable(examples[:half]), **self.unusable(examples[half:])}
        return {}

    def decoded(self, ids: Sequence[int]) -> str:
        """Return token ids as text, including special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    @abstractmethod
    def illustrated(self, item: Any, example: Example) -> str:
        """Return a prepared example as text, with its supervised text marked."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the base, also if it is inside a processor."""
        made: Any = self.base.tokenizer
        return made.tokenizer if isinstance(made, ProcessorMixin) else made

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
        if self.config.train.batching == "padded":
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
        with torch.no_grad(), self.runtime.accelerator.autocast():
            return self.outputs(model, examples[:PROBE_EXAMPLES]).float().cpu()

    def losses(self, model: nn.Module, examples: Sequence[Prepared]) -> EvalResult:
        """Score a model on examples without generating."""
        return evaluate(model, examples, self, runtime=self.runtime, batch_size=self.config.evaluation.eval_batch_size)

    def score(self, model: nn.Module, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples by all scores of the task."""
        return self.losses(model, examples)

    def plan_scores(self, plan: Plan) -> Mapping[str, float]:
        """Return scores of a trial's plan by name, of tasks that know which ranks are right."""
        return {}

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        """Return metric name -> value of a split."""
        return {
            "loss": result.loss,
            **({} if result.exact_match is None else {"exact_match": result.exact_match}),
            **result.others,
        }


def _token_ids(example: Any) -> tuple[Sequence[int], ...]:
    """Return the token ids of a prepared example that the model runs on."""
    inputs = getattr(example, "inputs", {})
    ids = getattr(example, "input_ids", inputs.get("input_ids", ()))
    return ids, getattr(example, "target_ids", ())
