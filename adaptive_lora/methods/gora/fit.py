"""GoRA: B is initialised from the gradient, projected on A."""

from __future__ import annotations

import dataclasses
import math

import torch

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.base import TrialContext
from adaptive_lora.methods.importance.capture import Measures, measure_sites
from adaptive_lora.methods.importance.contract import ZERO
from adaptive_lora.methods.importance.gradient import HalfSums


def compressed_gradient(gradient: torch.Tensor, a: torch.Tensor, *, gamma: float, scale: float) -> torch.Tensor:
    """Return B of shape (out, r) for which scale · B·A is an SGD step projected on A.

    With G the gradient and A fixed, -G Aᵀ (A Aᵀ)⁻¹ is the B whose product with A is nearest to -G.
    A random A keeps about r / in of the squared norm of G, so B is multiplied by
    gamma·sqrt(in / r) / scale: the first update has the norm of gamma·G. In the paper's terms,
    scale alpha / sqrt(r), the factor is gamma·sqrt(in) / alpha (2502.12171, section 3.3).

    Args:
        gradient: gradient of the weight, shape (out, in).
        a: fixed A, shape (r, in).
        gamma: learning rate of the step.
        scale: factor of B·A in the model.
    """
    g, rows = gradient.double(), a.double()
    nearest: torch.Tensor = -torch.linalg.solve(rows @ rows.T, rows @ g.T).T
    rank, width = rows.shape
    return (nearest * (gamma * math.sqrt(width / rank) / scale)).float()


class _Start(HalfSums):
    """Statistic that sums a site's gradient; its result is the site's initial B, kept under the site's name."""

    def __init__(self, keep: dict[str, torch.Tensor], name: str, a: torch.Tensor, **factors: float) -> None:
        super().__init__()
        self._keep, self._name, self._a, self._factors = keep, name, a, factors

    def finish(self) -> Measures:
        self._keep[self._name] = compressed_gradient(self.means().stack[0], self._a, **self._factors)
        return ZERO, ZERO, ZERO


def initial_b(trial: TrialContext, plan: RankPlan, gamma: float) -> dict[str, torch.Tensor]:
    """Return the initial B of every site; if memory requires it, one site's gradient is held at a time."""
    entries = {entry.site.name: entry for entry in plan.entries}
    found: dict[str, torch.Tensor] = {}

    def start(site: AdapterSite) -> _Start:
        entry = entries[site.name]
        return _Start(found, site.name, trial.initial_a(entry), gamma=gamma, scale=plan.scale_of(entry))

    measure_sites(
        dataclasses.replace(trial.profile_task(), sites=[entry.site for entry in plan.entries]),
        start,
        floats=lambda site: 2 * site.in_features * site.out_features,
    )
    return found
