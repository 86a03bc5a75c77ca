"""Profilers from the gradient of the frozen weights over calibration batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from adaptive_lora.data import Batch
from adaptive_lora.importance.profile import ImportanceProfile
from adaptive_lora.losses import token_scores
from adaptive_lora.runtime import Runtime
from adaptive_lora.sites import AdapterSite

Score = Callable[[torch.Tensor, torch.Tensor], float]


def weight_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return mean |w·g|: GoRA's importance (He et al. 2025, 2502.12171, section 3.2)."""
    return float((weight * gradient).abs().mean())


def gradient_norm(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return the Frobenius norm of the mean gradient."""
    return float(torch.linalg.vector_norm(gradient))


PROFILERS: Mapping[str, Score] = MappingProxyType(
    {"weight_gradient": weight_gradient, "gradient_norm": gradient_norm}
)
"""Metric -> score of one site from its weight and its gradient averaged over calibration tokens."""


def profile_importance(
    model: nn.Module,
    sites: Sequence[AdapterSite],
    batches: Sequence[Batch],
    *,
    metric: str,
    seed: int,
    runtime: Runtime,
) -> ImportanceProfile:
    """Measure the importance of sites; the model is left exactly as it was.

    Dropout is off. The gradient is that of the mean loss per supervised token over all batches.

    Args:
        model: base model without adapters.
        sites: where to measure.
        batches: calibration batches of the training part.
        metric: key of `PROFILERS`.
        seed: that drew the batches, kept for the record.
        runtime: device and precision.
    """
    started = time.perf_counter()
    score = PROFILERS[metric]
    modules = dict(model.named_modules())
    weights = {site.name: modules[site.name].weight for site in sites}
    model.to(runtime.device)
    tokens = sum(batch.supervised_tokens for batch in batches)
    middle = len(batches) // 2
    with _trainable(model, list(weights.values())):
        first = _gradients(model, weights, batches[:middle], tokens, runtime)
        second = _gradients(model, weights, batches[middle:], tokens, runtime)
    scores = {
        name: score(weight.detach().float(), first[name] + second[name])
        for name, weight in weights.items()
    }
    halves = [
        [score(weights[name].detach().float(), half[name]) for name in weights]
        for half in (first, second)
    ]
    return ImportanceProfile(
        metric=metric,
        scores=scores,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        seed=seed,
        stability=_rank_correlation(halves) if middle else math.nan,
    )


def _gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    tokens: int,
    runtime: Runtime,
) -> dict[str, torch.Tensor]:
    """Return the summed gradient of these batches, each token weighted 1/tokens."""
    for weight in weights.values():
        weight.grad = None
    for batch in batches:
        with runtime.accelerator.autocast():
            loss = token_scores(model, batch.to(runtime.device)).nll.sum() / tokens
        loss.backward()
    return {
        name: torch.zeros_like(weight, dtype=torch.float32)
        if weight.grad is None
        else weight.grad.detach().float().clone()
        for name, weight in weights.items()
    }


@contextmanager
def _trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these weights require gradients, in evaluation mode; undo it afterwards."""
    mode = model.training
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    model.eval()
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for weight in weights:
            weight.grad = None
        model.train(mode)


def _rank_correlation(halves: Sequence[Sequence[float]]) -> float:
    first, second = (np.asarray(half) for half in halves)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)
