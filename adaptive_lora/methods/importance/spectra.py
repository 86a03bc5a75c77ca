"""Spectra: squared singular values, and rank correlation of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import spearmanr

SPECTRUM_LIMIT = 256
"""Maximum number of components per site in a profile."""


def squared_singular_values(matrices: torch.Tensor) -> torch.Tensor:
    """Return squared singular values of matrices (..., a, b), not increasing.

    Computed from the Gram matrix of the smaller side: many times faster than a decomposition of the
    matrix itself, and exact to the type's precision relative to the largest value.
    """
    narrow = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    values: torch.Tensor = torch.linalg.eigvalsh(narrow @ narrow.mT)
    return values.flip(-1).clamp(min=0)


def spectrum(values: torch.Tensor) -> tuple[float, ...]:
    """Return the first `SPECTRUM_LIMIT` components, corrected to be non-increasing despite rounding."""
    kept = values[:SPECTRUM_LIMIT].cummin(dim=0).values
    return tuple(kept.tolist())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's correlation; NaN where one side is constant or shorter than 2."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)
