"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from adaptive_lora.config import DataConfig
from adaptive_lora.data import Batch, ExampleSet
from adaptive_lora.data.labelled import load_labelled
from adaptive_lora.models.scoring import ExampleScores
from adaptive_lora.models.tasks.classification import LabelledText, TextTask, logits_of
from adaptive_lora.results import PREDICTION, EvalResult


class RegressionTask(TextTask):
    """Squared error, in the square of the target's own unit."""

    name = "regression"
    unit = "squared error per example"

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_labelled(config, numbers=True)

    def labels(self, targets: Sequence[float]) -> torch.Tensor:
        return torch.tensor(targets, dtype=torch.float32)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return (logits_of(model, batch).squeeze(-1) - batch.labels).square().sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        predicted = logits_of(model, batch).squeeze(-1)
        return ExampleScores(
            nll=(predicted - batch.labels).square(),
            units=torch.ones_like(batch.labels, dtype=torch.long),
            correct=None,
            further={PREDICTION: predicted},
        )

    def losses(self, model: nn.Module, examples: Sequence[LabelledText]) -> EvalResult:  # type: ignore[override]
        result = super().losses(model, examples)
        targets = np.array([example.target for example in examples])
        return dataclasses.replace(result, overall=correlations(targets, result.further_E[PREDICTION]))


def correlations(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; empty where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predicted) == 0:
        return {}
    return {
        "pearson": float(pearsonr(targets, predicted).statistic),
        "spearman": float(spearmanr(targets, predicted).statistic),
    }
