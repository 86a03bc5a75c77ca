"""Spectra: squared singular values in float64, and rank correlation of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import spearmanr

SPECTRUM_LIMIT = 256
"""Most components of a site that a profile keeps."""


def squared_singular_values(matrices: torch.Tensor) -> torch.Tensor:
    """Return squared singular values of matrices (..., a, b), not increasing, float64.

    From the Gram matrix of the smaller side: many times faster than a decomposition of the matrix
    itself, and exact to about 1e-16 of the largest one.
    """
    wide = matrices.double()
    gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1).clamp(min=0)


def spectrum(values: torch.Tensor) -> tuple[float, ...]:
    """Return the first components, made non-increasing against rounding."""
    kept = values[:SPECTRUM_LIMIT].cummin(dim=0).values
    return tuple(float(value) for value in kept.cpu())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's correlation; NaN where one side is constant or shorter than 2."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)
