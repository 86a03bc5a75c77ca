"""Results of one trial: plain values passed between training, tracking and comparison; the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NATS_PER_TOKEN = "nats per token"
PREDICTION = "prediction"
RACED_STATUS = "RACED"
"""Status of a trial whose learning rate fell behind and was stopped (`--race`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Losses, tokens and costs of one training."""

    losses: tuple[float, ...]
    """Training loss per optimiser step: nats per supervised token; NaN where a step was skipped."""
    validation_curve: tuple[tuple[int, float], ...]
    """(optimiser step, validation loss in nats per supervised token); step 0 is before training."""
    validation_loss: float
    """Validation loss of the kept weights, in nats per supervised token: the last, or the best with early stopping."""
    tokens: int
    """Number of tokens processed by the model, without padding."""
    step_tokens: tuple[int, ...]
    """Value of `tokens` after each optimiser step."""
    order_digest: str
    """SHA-256 over the batches in training order, 16 hexadecimal digits: equal for all methods of
    a seed."""
    supervised_tokens: int
    """Number of tokens that the loss was computed on."""
    seconds: float
    """Wall time of the training steps in seconds, without validation; of steps shared by several
    trials, the trial's share by tokens."""
    peak_memory_bytes: int | None
    """Peak memory in bytes: device memory on a GPU; on a CPU, the model plus the growth of the
    process's memory, or None where the system does not report it."""
    micro_batch: int
    """Maximum number of examples per forward pass; below the batch size where memory was short."""
    trials_together: int
    """Number of trials trained together, this one included; 1: it trained alone."""
    waited_seconds: float
    """Wall time in seconds spent on steps of other trials; not included in `seconds`."""
    skipped_steps: int
    """Number of steps skipped because loss or gradient was not finite."""
    stopped_early: bool
    precision: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Scores per example (E = examples of the split), in the order of `example_ids`."""

    example_ids: tuple[str, ...]
    nll_E: FloatArray
    """Negative log-likelihood of the response, summed over its tokens, in nats."""
    tokens_E: IntArray
    """Supervised tokens per example; 1 where the task counts examples."""
    correct_E: IntArray | None
    """Number of supervised tokens per example whose most likely prediction is right; None for
    tasks without right or wrong predictions, such as regression."""
    exact_match_E: FloatArray | None = None
    """1 where greedy generation equals the reference, else 0; None where not scored."""
    further_E: Mapping[str, FloatArray] = field(default_factory=dict)
    """Other scores of the task by name, such as ROUGE; `prediction` is the model's output."""
    overall: Mapping[str, float] = field(default_factory=dict)
    """Scores of the whole split by name, such as F1."""
    unit: str = NATS_PER_TOKEN
    """Unit of `loss`."""

    @property
    def loss(self) -> float:
        """Mean loss, nll over tokens, in `unit`: nats per supervised token by default."""
        return float(self.nll_E.sum() / self.tokens_E.sum())

    @property
    def perplexity(self) -> float | None:
        """exp(loss), infinite on overflow; None where the loss is not per token."""
        if self.unit != NATS_PER_TOKEN:
            return None
        return float(np.exp(np.float64(self.loss))) if self.loss < 700 else float("inf")

    @property
    def token_accuracy(self) -> float | None:
        """Share of supervised tokens predicted right, or of examples where the task counts examples."""
        if self.correct_E is None:
            return None
        return float(self.correct_E.sum() / self.tokens_E.sum())

    @property
    def others(self) -> dict[str, float]:
        """Scores of the task except loss and exact match, including means over examples."""
        means = {n: float(each.mean()) for n, each in self.further_E.items() if n != PREDICTION}
        return {**means, **self.overall}

    @property
    def exact_match(self) -> float | None:
        """Share of examples answered exactly, or None where not scored."""
        return None if self.exact_match_E is None else float(self.exact_match_E.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class RetainedScores:
    """Scores on data that a trial was not trained for, before and after its training."""

    source: str
    """Name of the source."""
    before: EvalResult
    """Scores of the frozen base without adapter."""
    after: EvalResult
    """Scores of the trained adapter on the same examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One completed trial, as `compare` reads it back from the tracking store."""

    run_id: str
    method: str
    """Label of the method, such as `linear_decay-r16-4`."""
    seed: int
    fold: int
    lr: float | None
    """Peak learning rate; None where it is not known, as of runs made elsewhere."""
    status: str
    """Status: FINISHED, FAILED or RACED."""
    reason: str = ""
    """Reason why a trial failed or was stopped; empty otherwise."""
    trainable_parameters: int | None = 0
    """Parameters of the adapter as served; None where not known."""
    validation_loss: float = float("nan")
    validation_curve: tuple[tuple[int, float], ...] = ()
    validation_tokens: tuple[int, ...] = ()
    """Tokens seen at each point of `validation_curve`; empty where not recorded."""
    test: EvalResult | None = None
    """Scores on the test split; None for failed trials."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """`to_dict()` of a `RankPlan` or `TunerPlan`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the run, such as `tokens_per_second`, `peak_memory_bytes`, `skipped_steps`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the run that the fairness audit compares, such as `precision`, `data_digest`, `order_digest`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the run: `cfg.*` of the study, `method.*` of the method."""
    retained: Mapping[str, RetainedScores] = field(default_factory=dict)
    """Digest of retained data -> scores on them; empty without `retain_data`."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class TableRows(Sequence[Mapping[str, Any]]):
    """Rows of a table as a sequence of dictionaries, which `pandas.DataFrame` takes."""

    values: tuple[Mapping[str, Any], ...]
    """One dictionary per row."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """Return a row, or the rows of a slice."""
        return self.values[at]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yield the rows."""
        return iter(self.values)
