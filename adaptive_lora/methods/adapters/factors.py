"""Trained updates as plain factors, and their restoration into a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Factors of one site's update B·A, without LoRA's scale."""

    a: torch.Tensor
    """A, shape (r, in)."""
    b: torch.Tensor
    """B, shape (out, r)."""
    magnitude: torch.Tensor | None = None
    """DoRA's magnitudes, shape (out,), or None."""


def read_factors(adapted: Any) -> dict[str, Factors]:
    """Return a copy of the A and B of every site."""

    def copied(modules: Any) -> torch.Tensor:
        weight: torch.Tensor = modules[ADAPTER].weight
        return weight.detach().clone()

    return {
        name: Factors(
            a=copied(layer.lora_A),
            b=copied(layer.lora_B),
            magnitude=copied(layer.lora_magnitude_vector) if layer.use_dora[ADAPTER] else None,
        )
        for name, layer in lora_layers(adapted).items()
    }


def write_factors(adapted: Any, factors: Mapping[str, Factors]) -> None:
    """Copy A, B and magnitudes of these sites into a LoRA model with the same ranks."""
    layers = lora_layers(adapted)
    with torch.no_grad():
        for name, site in factors.items():
            layers[name].lora_A[ADAPTER].weight.copy_(site.a)
            layers[name].lora_B[ADAPTER].weight.copy_(site.b)
            if site.magnitude is not None:
                layers[name].lora_magnitude_vector[ADAPTER].weight.copy_(site.magnitude)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The singular value decomposition of one site's scaled update, float64."""

    left: torch.Tensor
    """Left singular vectors, shape (out, r), orthonormal columns."""
    values: torch.Tensor
    """Singular values, shape (r,), not increasing."""
    right: torch.Tensor
    """Right singular vectors, shape (r, in), orthonormal rows."""

    magnitude: torch.Tensor | None = None
    """DoRA's magnitudes, shape (out,), or None; truncation keeps them."""

    def cut(self, rank: int, scale: float) -> Factors:
        """Return the best rank-`rank` approximation as factors for a site of this scale.

        Each factor is multiplied by the root of the singular values, so that both have equal norm.
        """
        root = (self.values[:rank] / scale).sqrt()
        return Factors(
            a=(root[:, None] * self.right[:rank]).float(),
            b=(self.left[:, :rank] * root).float(),
            magnitude=self.magnitude,
        )


def spectrum(factors: Factors, scale: float) -> Spectrum:
    """Compute the singular value decomposition of scale · B·A without forming the product.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the r x r core R_b R_aᵀ has the same singular values
    (PARA 2604.27796).
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, values, vt = torch.linalg.svd(scale * r_b @ r_a.T)
    return Spectrum(left=q_b @ u, values=values, right=vt @ q_a.T, magnitude=factors.magnitude)
