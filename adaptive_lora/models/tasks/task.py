"""What a task answers: how its base is loaded, what its rows mean, its loss and its scores."""

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
    """Return a text as one that is learned, for people."""
    return f"[[{text}]]"


class Task(ABC):
    """A task on a base. All of it is the same for every method of a comparison."""

    name: ClassVar[str]
    """Key of `TASKS`, and of the classes that `adapter_serving` loads."""
    unit: ClassVar[str] = NATS_PER_TOKEN
    """What the mean loss is counted in, in the words of reports."""

    tokenised: ClassVar[type[Tokenised] | None] = None
    """What `prepare` makes of an example, where that is tokens alone: these are kept on disk."""

    losses_by_example: LossByExample | None = None
    """`loss` of each example where the task has it: then several trials can train together."""

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Take a study's settings and a base that was loaded for this task."""
        self.config, self.runtime, self.base = config, runtime, base

    @property
    def longest(self) -> int:
        """Most tokens of an example: what the study allows and the base and tokenizer take."""
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
            DataError: unreadable, columns missing, nothing left.
        """

    @property
    def served(self) -> dict[str, Any]:
        """What an adapter records of its task: how its base is loaded, and how it is served."""
        return dict(self.base.task)

    @classmethod
    def record(cls, data: ExampleSet) -> dict[str, Any]:
        """Return what loading and serving the base need to know of the task, JSON-ready."""
        return {"name": cls.name}

    def require_usable(self) -> None:  # noqa: B027 - most tasks take any base that loads
        """Check that the base, on its device, computes what the task takes it to.

        Raises:
            ModelError: it does not; says what it does.
        """

    @abstractmethod
    def prepare(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        """Return examples as `collate` takes them; each is a `Prepared`.

        Raises:
            BadRow: an example cannot be used.
        """

    def prepared(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        """Return what `prepare` makes of a whole data set; tokens made before come from disk.

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
                "saved with its tokenizer: adapters leave embeddings alone), or take these tokens "
                "out of the texts or the tokenizer."
            )
        return made

    def _prepared_once(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        kind, trusted = self.tokenised, self.base.reference.trust_remote_code
        # What a base's own Python does to texts, or the time in a template, cannot be told from its
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
        """Return `id` of an example that cannot be used -> why, where `prepare` refused one.

        By halves, so that all are found without preparing the others one by one.
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
        """Return token ids as text, special tokens too."""
        return str(self.tokenizer.decode(list(ids)))

    @abstractmethod
    def illustrated(self, item: Any, example: Example) -> str:
        """Return a prepared example as text, with what is learned of it marked."""

    @property
    def tokenizer(self) -> Any:
        """What makes token ids of texts, inside a processor or alone."""
        made: Any = self.base.tokenizer
        return made.tokenizer if isinstance(made, ProcessorMixin) else made

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return a batch of prepared examples."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss summed over what the batch supervises: what is minimised."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Return the scores of each example of a batch."""

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Run a model by fused steps inside the block, unless the study wants the plain ones.

        Gradients must be formed inside the block too.
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

        An adapter that was saved and loaded back must give the same again.
        """

    def probe(self, model: nn.Module, examples: Sequence[Any]) -> torch.Tensor:
        """Return the outputs for the first examples of a part, without gradients."""
        model.eval()
        with torch.no_grad(), self.runtime.accelerator.autocast():
            return self.outputs(model, examples[:PROBE_EXAMPLES]).float().cpu()

    def losses(self, model: nn.Module, examples: Sequence[Prepared]) -> EvalResult:
        """Score a model on examples without generating."""
        return evaluate(model, examples, self, runtime=self.runtime, batch_size=self.config.evaluation.eval_batch_size)

    def score(self, model: nn.Module, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples by all that the task has."""
        return self.losses(model, examples)

    def plan_scores(self, plan: Plan) -> Mapping[str, float]:
        """Return scores of a trial's plan by name, of tasks that know which ranks are right."""
        return {}

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        """Return the metrics of a part by name."""
        return {
            "loss": result.loss,
            **({} if result.exact_match is None else {"exact_match": result.exact_match}),
            **result.others,
        }


def _token_ids(example: Any) -> tuple[Sequence[int], ...]:
    """Return the token ids that a prepared example has the model run."""
    inputs = getattr(example, "inputs", {})
    ids = getattr(example, "input_ids", inputs.get("input_ids", ()))
    return ids, getattr(example, "target_ids", ())
