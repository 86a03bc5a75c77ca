"""The whitened gradient: predicted gain of each rank of a site, in nats."""

from __future__ import annotations

import torch

from adaptive_lora.methods.importance.capture import Measures
from adaptive_lora.methods.importance.contract import SiteMeasure
from adaptive_lora.methods.importance.gradient import MeanGradients, SiteSums
from adaptive_lora.methods.importance.moments import DAMPING, whiten
from adaptive_lora.methods.importance.spectra import eigenvalues, gram, narrow, spectrum


def whitened_gradient(sums: SiteSums, means: MeanGradients) -> Measures:
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
    outputs = sums.outputs / max(1, sum(sums.tokens))
    inputs = sums.inputs / max(1, sums.positions)
    return gains(means, outputs, inputs)


def gains(gradients: MeanGradients, outputs: torch.Tensor, inputs: torch.Tensor, damping: float = DAMPING) -> Measures:
    """Return the gains above the noise edge, on all data and on the halves.

    Both halves are whitened by the covariances of all data. A half with t of T tokens has T/t times
    the noise variance of all data.
    """
    halves = narrow(whiten(gradients.stack[1:], outputs, inputs, damping))
    share = [tokens / max(1, sum(gradients.tokens)) for tokens in gradients.tokens]
    both, whole = gram(halves), gram(share[0] * halves[0] + share[1] * halves[1])
    noise = share[0] * both[0] + share[1] * both[1] - whole  # the Gram matrix of sqrt(share share) (first - second)
    squares = eigenvalues(torch.stack([whole, *both, noise]))
    edge = squares[3, 0]
    scales = (1.0, *(1 / part if part else 1.0 for part in share))
    parts = ((values - edge * scale).clamp(min=0) / 2 for values, scale in zip(squares[:3], scales, strict=True))
    return [SiteMeasure(score=float(worth.sum()), spectrum=spectrum(worth)) for worth in parts]
