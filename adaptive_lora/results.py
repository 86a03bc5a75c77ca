"""What one trial produced: plain values that pass between training, tracking and comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """The course of one training."""

    losses: tuple[float, ...]
    """Training loss per optimiser step: nats per supervised token; NaN where a step was skipped."""
    validation_curve: tuple[tuple[int, float], ...]
    """(optimiser step, validation loss in nats per supervised token); step 0 is before training."""
    validation_loss: float
    """Of the weights that were kept: the last, or the best where early stopping is on."""
    tokens: int
    """Tokens that went through the model, padding not counted."""
    step_tokens: tuple[int, ...]
    """`tokens` as it stood after each optimiser step."""
    order_digest: str
    """SHA-256 over the batches in the order in which they were learned from, 16 digits: equal for
    every method of a seed."""
    supervised_tokens: int
    """Tokens whose loss was learned from."""
    seconds: float
    """Wall time of the training steps alone, without validation; of steps that several trials took
    together, the share that the trial's tokens have."""
    peak_memory_bytes: int | None
    """Device memory on a GPU; on a CPU the model and what training added to the process's memory,
    or None where the system does not tell."""
    micro_batch: int
    """Most examples per forward pass; below the batch size where memory was short."""
    trials_together: int
    """Trials whose steps were taken in one, this one included; 1: it trained alone."""
    waited_seconds: float
    """Wall time in which other trials had their turn; no part of `seconds`."""
    skipped_steps: int
    """Steps left out because loss or gradient was not finite."""
    stopped_early: bool
    precision: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Scores per example (E = examples of the part), in the order of `example_ids`."""

    example_ids: tuple[str, ...]
    nll_E: FloatArray
    """Negative log-likelihood of the response, summed over its tokens, in nats."""
    tokens_E: IntArray
    """Supervised tokens per example; 1 where the task counts examples."""
    correct_E: IntArray | None
    """Supervised tokens whose most likely prediction is right; None where nothing is right or
    wrong, as in regression."""
    exact_match_E: FloatArray | None = None
    """1 where greedy generation gives the reference, else 0; None where not scored."""
    further_E: Mapping[str, FloatArray] = field(default_factory=dict)
    """Other scores of the task by name, such as ROUGE; `prediction` is what the model said."""
    overall: Mapping[str, float] = field(default_factory=dict)
    """Scores of the part as a whole by name, such as F1."""
    unit: str = NATS_PER_TOKEN
    """What `loss` is counted in."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats per supervised token where `unit` says no other: nll over tokens."""
        return float(self.nll_E.sum() / self.tokens_E.sum())

    @property
    def perplexity(self) -> float | None:
        """exp(loss), infinite where that overflows; None where the loss is none of tokens."""
        if self.unit != NATS_PER_TOKEN:
            return None
        return float(np.exp(np.float64(self.loss))) if self.loss < 700 else float("inf")

    @property
    def token_accuracy(self) -> float | None:
        """Share of supervised tokens, or of examples where these are counted, predicted right."""
        if self.correct_E is None:
            return None
        return float(self.correct_E.sum() / self.tokens_E.sum())

    @property
    def others(self) -> dict[str, float]:
        """Scores of the task beside loss and exact match, means over examples among them."""
        means = {n: float(each.mean()) for n, each in self.further_E.items() if n != PREDICTION}
        return {**means, **self.overall}

    @property
    def exact_match(self) -> float | None:
        """Share of examples answered exactly, or None where not scored."""
        return None if self.exact_match_E is None else float(self.exact_match_E.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial that ended, as `compare` reads it back from the tracking store."""

    run_id: str
    method: str
    """Label of the method, such as `linear_decay-r16-4`."""
    seed: int
    fold: int
    lr: float
    status: str
    """FINISHED, FAILED or RACED."""
    reason: str = ""
    """Why a trial failed or was stopped."""
    trainable_parameters: int = 0
    validation_loss: float = float("nan")
    validation_curve: tuple[tuple[int, float], ...] = ()
    validation_tokens: tuple[int, ...] = ()
    """Tokens seen at each point of `validation_curve`; empty where not recorded."""
    test: EvalResult | None = None
    """Scores on the test part; None for failed trials."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """`to_dict()` of a `RankPlan` or `TunerPlan`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the run, such as `tokens_per_second`, `peak_memory_bytes`, `skipped_steps`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What the fairness audit compares, such as `precision`, `data_digest`, `order_digest`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the run: `cfg.*` of the study, `method.*` of the method."""
