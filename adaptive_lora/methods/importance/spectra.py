"""Squared singular values of gradients, from Gram matrices of the smaller side."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigh

SPECTRUM_LIMIT = 256
"""Maximum number of components per site in a profile."""
_TILES = 8
"""Number of tiles of each side of a Gram matrix, of which those below the diagonal are not computed."""
_SMALL = 256
"""Side below which a Gram matrix is computed at once."""


def gram(matrices: torch.Tensor) -> torch.Tensor:
    """Return the upper triangles of M Mᵀ of matrices (..., a, b); what is below the diagonal is undefined."""
    side = matrices.shape[-2]
    if side < _SMALL or matrices.is_cuda:
        return matrices @ matrices.mT
    product = matrices.new_zeros(*matrices.shape[:-1], side)
    width = -(-side // _TILES)
    for at in range(0, side, width):
        product[..., at : at + width, at:] = matrices[..., at : at + width, :] @ matrices[..., at:, :].mT
    return product


def eigenvalues(symmetric: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues, not increasing and at least 0, of matrices of which the upper triangle is read.

    On a CPU by scipy's LAPACK, which takes two thirds of the time of torch's.
    """
    if symmetric.device.type != "cpu" or not torch.isfinite(symmetric).all():
        values: torch.Tensor = torch.linalg.eigvalsh(symmetric, UPLO="U")
        return values.flip(-1).clamp(min=0)
    flat = symmetric.reshape(-1, *symmetric.shape[-2:]).numpy()
    found = [eigh(each.T, lower=True, eigvals_only=True, check_finite=False, driver="evr") for each in flat]
    return torch.from_numpy(np.stack(found)).view(symmetric.shape[:-1]).flip(-1).clamp(min=0)


def narrow(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices, or their transposes where these have fewer rows."""
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT


def squared_singular_values(matrices: torch.Tensor) -> torch.Tensor:
    """Return squared singular values of matrices (..., a, b), not increasing.

    Computed from the Gram matrix of the smaller side: many times faster than a decomposition of the
    matrix itself, and exact to the type's precision relative to the largest value.
    """
    return eigenvalues(gram(narrow(matrices)))


def spectrum(values: torch.Tensor) -> tuple[float, ...]:
    """Return the first `SPECTRUM_LIMIT` components, corrected to be non-increasing despite rounding."""
    kept = values[:SPECTRUM_LIMIT].cummin(dim=0).values
    return tuple(kept.tolist())
