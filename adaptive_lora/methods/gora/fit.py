"""GoRA: B is initialised from the gradient, projected on A."""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from adaptive_lora.allocation import RankPlan
from adaptive_lora.methods.adapters import audit_moved
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers, start_magnitudes
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.gora import Gora
from adaptive_lora.methods.importance.capture import Measures, measure_sites
from adaptive_lora.methods.importance.contract import ZERO
from adaptive_lora.methods.importance.gradient import HalfSums


def fit_gora(options: Gora, trial: TrialContext) -> TrainedTrial:
    """Attach the plan, initialise every B from its site's gradient, train."""
    started = time.perf_counter()
    plan = trial.plan
    initial = _initial_b(trial, plan, options.gamma)
    adapted = trial.attach(plan)
    with torch.no_grad():
        for name, layer in lora_layers(adapted).items():
            layer.lora_B[ADAPTER].weight.copy_(initial[name])
    start_magnitudes(adapted)
    seconds = time.perf_counter() - started
    result = trial.train(adapted)
    audit_moved(adapted, initial)
    return TrainedTrial(
        model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters, search_seconds=seconds
    )


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
    """Statistic that sums a site's gradient; its result is the site's initial B."""

    def __init__(self, keep: dict[str, torch.Tensor], name: str, start: _Site) -> None:
        super().__init__()
        self._keep, self._name, self._site = keep, name, start

    def finish(self) -> Measures:
        site = self._site
        self._keep[self._name] = compressed_gradient(self.means().stack[0], site.a, gamma=site.gamma, scale=site.scale)
        return ZERO, ZERO, ZERO


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Site:
    a: torch.Tensor
    gamma: float
    scale: float


def _initial_b(trial: TrialContext, plan: RankPlan, gamma: float) -> dict[str, torch.Tensor]:
    """Return the initial B of every site; if memory requires it, one site's gradient is held at a time."""
    entries = {entry.site.name: entry for entry in plan.entries}
    found: dict[str, torch.Tensor] = {}
    task = dataclasses.replace(trial.profile_task(), sites=[entry.site for entry in plan.entries])
    measure_sites(
        task,
        lambda site: _Start(
            found,
            site.name,
            _Site(a=trial.initial_a(entries[site.name]), gamma=gamma, scale=plan.scale_of(entries[site.name])),
        ),
        floats=lambda site: 2 * site.in_features * site.out_features,
    )
    return found
