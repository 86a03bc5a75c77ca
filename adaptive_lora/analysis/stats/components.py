"""Variance components of a paired difference: seeds, examples, and both together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Variance components of a paired difference, in (nats per token)^2."""

    seed: float
    """Variance between seeds, on every example alike: only more seeds reduce it."""
    example: float
    """Variance between examples, under every seed alike: only more examples reduce it. Invisible to tests
    over seeds, which ask about the examples at hand."""
    residual: float
    """Variance of one example under one seed beyond both; reduced by seeds and by examples."""
    seeds: int
    examples: int
    """Test examples per seed."""

    def standard_deviation(self, examples: int) -> float:
        """Return the standard deviation over seeds of the difference on so many examples."""
        return math.sqrt(self.seed + self.residual / examples)

    def standard_error(self, seeds: int, examples: int) -> float:
        """Return the standard error of the mean, were seeds and examples both drawn anew."""
        return math.sqrt(self.seed / seeds + self.example / examples + self.residual / (seeds * examples))


def variance_components(
    diff_SE: Sequence[ArrayLike], weight_SE: Sequence[ArrayLike], *, crossed: bool
) -> Components | None:
    """Estimate the components by analysis of variance; None below 2 seeds or 2 examples.

    The difference of a seed is sum(diff) / sum(weight); each example enters as its linearised
    share (diff - mean x weight) / mean weight, whose mean over examples is the seed's difference
    minus the overall one.

    Args:
        diff_SE: per seed, differences of summed loss per example.
        weight_SE: per seed, supervised tokens per example.
        crossed: all seeds saw the same examples in the same order. Otherwise the variance between
            examples cannot be told from the residual and is part of it.

    Not to be believed to the digit: a variance from 6 seeds is uncertain by a factor of 2 and
    more. Negative estimates become 0.

    Source: Searle, Casella & McCulloch 1992, Variance Components, sections 3.2 and 4.3.
    """
    diffs = [np.asarray(row, dtype=np.float64) for row in diff_SE]
    weights = [np.asarray(row, dtype=np.float64) for row in weight_SE]
    seeds, examples = len(diffs), min((row.size for row in diffs), default=0)
    if seeds < 2 or examples < 2:
        return None
    mean = np.mean([d.sum() / w.sum() for d, w in zip(diffs, weights, strict=True)])
    parts = [(d - mean * w) / w.mean() for d, w in zip(diffs, weights, strict=True)]
    mean_S = np.array([part_E.mean() for part_E in parts])
    between = float(mean_S.var(ddof=1))
    if not crossed:
        size = float(np.mean([part_E.size for part_E in parts]))
        within = float(np.mean([part_E.var(ddof=1) for part_E in parts]))
        return Components(
            seed=max(0.0, between - within / size), example=0.0, residual=within, seeds=seeds, examples=round(size)
        )
    part_SE = np.stack(parts)
    mean_E = part_SE.mean(axis=0)
    rest_SE = part_SE - mean_S[:, None] - mean_E + part_SE.mean()
    residual = float((rest_SE**2).sum() / ((seeds - 1) * (examples - 1)))
    return Components(
        seed=max(0.0, between - residual / examples),
        example=max(0.0, float(mean_E.var(ddof=1)) - residual / seeds),
        residual=residual,
        seeds=seeds,
        examples=examples,
    )
