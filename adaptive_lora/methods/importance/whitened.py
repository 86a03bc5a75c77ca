"""The whitened gradient: what each rank of a site would gain, in nats."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.importance.capture import Measures, SiteRows, measure_sites
from adaptive_lora.methods.importance.contract import Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.gradient import HalfSums, MeanGradients
from adaptive_lora.methods.importance.spectra import spectrum, squared_singular_values

DAMPING = 0.3
"""Added to a covariance: this share of its mean eigenvalue."""
BLOCK = 128
"""Widest block of a covariance; between blocks it counts as zero. Blocks take less than the weight
itself and estimate better from little data: on the embedded base, 32 examples in blocks rank sites
like 640 examples with full covariances (Spearman 0.93), and 64 examples with full ones do not do
better (0.86 at this damping)."""


def whitened_gradient(task: ProfileTask) -> Measurement:
    """Measure the loss that the best update of each rank takes off, under a quadratic model.

    With gradient G of the mean loss per supervised token, input covariance C and output-gradient
    covariance S (K-FAC's Kronecker curvature, Martens and Grosse 2015, 1503.05671; every token
    counts as an example, as in K-FAC-expand, Eschenhagen et al. 2023, 2311.00636), an update D
    changes the loss by <G, D> + tr(S D C Dᵀ)/2. Its best rank-r value is half the sum of the first
    r squared singular values of S^(-1/2) G C^(-1/2), so gains are in nats per supervised token and
    compare between sites.

    Noise: the whitened half gradients differ by noise alone. Scaled to the noise of their mean,
    the largest singular value of that difference is the edge e below which nothing can be told
    from noise; each component counts (sigma² - e²)/2. For square maps and white noise that is
    exactly the shrinkage of least squared error (Gavish and Donoho 2017, 1405.7511).

    Score: the sum of the gains. Do not read gains as promises: curvature is the empirical Fisher's,
    block-diagonal, and far from a minimum the quadratic model overstates what one step brings.
    """
    return measure_sites(task, _Whitened, floats=_held)


def _held(site: AdapterSite) -> int:
    sides = site.in_features, site.out_features
    return 2 * site.in_features * site.out_features + sum(BLOCK * side for side in sides)


class _Whitened(HalfSums):
    """Gradients of the halves with the covariances of inputs and output gradients."""

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
    """Return the blocks (K, w, w) on the diagonal of the sum of outer products of rows (N, n).

    All blocks are of one width w <= block; the last ones end in zeros where n is no multiple.
    """
    split = _blocked(rows.T, block)
    moments: torch.Tensor = split @ split.mT
    return moments


def _blocked(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Return (..., n, p) as (..., K, w, p) with K blocks of w rows, filled up with zeros."""
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

    Cholesky factors stand in for square roots: they differ by rotations of the two sides, which
    leave singular values as they are, and cost a tenth.

    Args:
        matrices: gradients.
        outputs: blocks (K, w, w) of the covariance of output gradients.
        inputs: blocks of the second moment of inputs.
        damping: share of the mean eigenvalue that is added to every eigenvalue; above 0 where the
            last block is filled up with zeros.
    """
    return _half_solve(_half_solve(matrices, outputs, damping).mT, inputs, damping).mT


def _half_solve(matrices: torch.Tensor, blocks: torch.Tensor, damping: float) -> torch.Tensor:
    """Return L⁻¹ matrices with L Lᵀ the damped covariance; zeros where it is zero."""
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
    """Return the gains of all data and of the halves above the noise edge.

    Both halves are whitened by the covariances of all data. A half of t tokens among T has T/t
    times the noise variance of all.
    """
    first, second = whiten(gradients.stack[1:], outputs, inputs, damping)
    share = [tokens / max(1, sum(gradients.tokens)) for tokens in gradients.tokens]
    whole = share[0] * first + share[1] * second
    noise = math.sqrt(share[0] * share[1]) * (first - second)
    squares = squared_singular_values(torch.stack([whole, first, second, noise]))
    edge = squares[3, 0]
    scales = (1.0, *(1 / part if part else 1.0 for part in share))
    whole_gain, one, two = (_above(values, edge * scale) for values, scale in zip(squares[:3], scales, strict=True))
    return whole_gain, one, two


def _above(squares: torch.Tensor, edge: torch.Tensor) -> SiteMeasure:
    worth = (squares - edge).clamp(min=0) / 2
    return SiteMeasure(score=float(worth.sum()), spectrum=spectrum(worth))
