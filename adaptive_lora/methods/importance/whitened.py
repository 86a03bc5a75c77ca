"""The whitened gradient: predicted gain of each rank of a site, in nats."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.importance.capture import Measures, SiteRows, measure_sites
from adaptive_lora.methods.importance.contract import (
    Measurement,
    ProfileTask,
    SiteMeasure,
    spectrum,
    squared_singular_values,
)
from adaptive_lora.methods.importance.gradient import HalfSums, MeanGradients

DAMPING = 0.3
"""Share of a covariance's mean eigenvalue that is added to its diagonal."""
BLOCK = 128
"""Widest block of a covariance; between blocks it counts as zero. Blocks take less than the weight
itself and estimate better from little data: on the embedded base, 32 examples in blocks rank sites
like 640 examples with full covariances (Spearman 0.93), and 64 examples with full ones do not do
better (0.86 at this damping)."""


def whitened_gradient(task: ProfileTask) -> Measurement:
    """Measure the reduction of the loss by the best update of each rank, under a quadratic model.

    With gradient G of the mean loss per supervised token, input covariance C and output-gradient
    covariance S (K-FAC's Kronecker curvature, Martens and Grosse 2015, 1503.05671; every token
    counts as an example, as in K-FAC-expand, Eschenhagen et al. 2023, 2311.00636), an update D
    changes the loss by <G, D> + tr(S D C Dᵀ)/2. Its best rank-r value is half the sum of the first
    r squared singular values of S^(-1/2) G C^(-1/2), so gains are in nats per supervised token and
    compare between sites.

    Noise: the whitened half gradients differ by noise alone. Scaled to the noise of their mean, the
    largest singular value of that difference is the edge e below which components are
    indistinguishable from noise; each component counts (sigma² - e²)/2. For square weights and white
    noise this is exactly the shrinkage of least squared error (Gavish and Donoho 2017, 1405.7511).

    Score: the sum of the gains. Gains are not predictions of training: the curvature is the empirical
    Fisher's, block-diagonal, and far from a minimum the quadratic model overstates a step's gain.
    """
    return measure_sites(task, _Whitened, floats=_held)


def _held(site: AdapterSite) -> int:
    sides = site.in_features, site.out_features
    return 2 * site.in_features * site.out_features + sum(BLOCK * side for side in sides)


class _Whitened(HalfSums):
    """Statistic: gradients of the halves, and covariances of inputs and output gradients."""

    def __init__(self, site: AdapterSite) -> None:
        """Start empty."""
        super().__init__()
        self.site, self.positions = site, 0
        self.inputs = self.outputs = torch.zeros(())

    def add(self, rows: SiteRows) -> None:
        super().add(rows)
        inputs = rows.inputs[rows.mask]
        self.inputs = second_moment(inputs) + self.inputs.to(inputs.device)
        self.outputs = second_moment(rows.gradients.flatten(0, 1)) + self.outputs.to(inputs.device)
        self.positions += len(inputs)

    def finish(self) -> Measures:
        outputs = self.outputs / max(1, sum(self.tokens))
        inputs = self.inputs / max(1, self.positions)
        return gains(self.means(), outputs, inputs)


def second_moment(rows: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Return the diagonal blocks (K, w, w) of the sum of outer products of rows (N, n).

    All blocks have the same width w <= block; the last ones are padded with zeros if n is not a
    multiple of it.
    """
    split = _blocked(rows.T, block)
    moments: torch.Tensor = split @ split.mT
    return moments


def _blocked(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Reshape (..., n, p) to (..., K, w, p), K blocks of w rows, padded with zeros."""
    n = matrix.shape[-2]
    count = -(-n // block)
    width = -(-n // count)
    filled = functional.pad(matrix, (0, 0, 0, count * width - n))
    split: torch.Tensor = filled.unflatten(-2, (count, width))
    return split


def whiten(
    matrices: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """Return matrices (..., out, in) with both sides whitened.

    Cholesky factors replace square roots: they differ by rotations of the two sides, which do not
    change singular values, and cost a tenth.

    Args:
        matrices: gradients, shape (..., out, in).
        outputs: blocks (K, w, w) of the covariance of output gradients.
        inputs: blocks (K, w, w) of the second moment of inputs.
        damping: share of the mean eigenvalue added to every eigenvalue; above 0 where the last block
            is padded with zeros.
    """
    return _half_solve(_half_solve(matrices, outputs, damping).mT, inputs, damping).mT


def _half_solve(matrices: torch.Tensor, blocks: torch.Tensor, damping: float) -> torch.Tensor:
    """Return L⁻¹ matrices, where L Lᵀ is the damped covariance; zeros where the covariance is zero."""
    size, width = matrices.shape[-2], blocks.shape[-1]
    trace = blocks.diagonal(dim1=-2, dim2=-1).sum()
    if trace == 0:
        return torch.zeros_like(matrices)
    extra = damping * trace / size
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(extra)
    factor: torch.Tensor = torch.linalg.cholesky(damped)
    split = _blocked(matrices, width)
    solved: torch.Tensor = torch.linalg.solve_triangular(factor, split, upper=False)
    return solved.flatten(-3, -2)[..., :size, :]


def gains(gradients: MeanGradients, outputs: torch.Tensor, inputs: torch.Tensor, damping: float = DAMPING) -> Measures:
    """Return the gains above the noise edge, on all data and on the halves.

    Both halves are whitened by the covariances of all data. A half with t of T tokens has T/t times
    the noise variance of all data.
    """
    first, second = whiten(gradients.stack[1:], outputs, inputs, damping)
    share = [tokens / max(1, sum(gradients.tokens)) for tokens in gradients.tokens]
    whole = share[0] * first + share[1] * second
    noise = math.sqrt(share[0] * share[1]) * (first - second)
    squares = squared_singular_values(torch.stack([whole, first, second, noise]))
    edge = squares[3, 0]
    scales = (1.0, *(1 / part if part else 1.0 for part in share))
    parts = ((values - edge * scale).clamp(min=0) / 2 for values, scale in zip(squares[:3], scales, strict=True))
    return [SiteMeasure(score=float(worth.sum()), spectrum=spectrum(worth)) for worth in parts]
