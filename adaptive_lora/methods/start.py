"""Initial A and B from the weight, its inputs or its gradient, and the training that starts from them.

PEFT's own initialisation changes the base's weights, needs matrices of nn.Linear for OLoRA and LoftQ, a GPU for LoftQ,
and one example at a time for CorDA. Here the factors are computed by the papers' formulas for every layer that takes an
adapter, and the base is not touched: what the start takes out of a weight is a second, constant half of the adapter
(`RankPlan.built`). Saved with the adapter, it makes it plain LoRA on the base as it was, as PEFT's conversion does
(`path_initial_model_for_weight_conversion`), also with rsLoRA under mixed ranks, with DoRA and with a trained head, for
which PEFT has none.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.allocation.plan import RankPlan, SiteRank
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.allocation.start import Start
from adaptive_lora.methods.adapters import audit_moved
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers, start_magnitudes
from adaptive_lora.methods.base import TrainedTrial, TrainerCallback, TrialContext
from adaptive_lora.methods.importance.capture import Measures, SiteRows, Statistic, measure_sites
from adaptive_lora.methods.importance.contract import ZERO
from adaptive_lora.methods.importance.gradient import HalfSums, weight_of
from adaptive_lora.seeding import rng_for

Pair = tuple[torch.Tensor, torch.Tensor]
"""A of shape (r, in) and B of shape (out, r), float32."""
_GAMMA = 16
"""LoRA-GA's factor of stability, PEFT's default."""
_DAMPING = 0.01
"""Share of the mean of a covariance's diagonal that CorDA adds to it, as in PEFT."""


def fit_from_start(trial: TrialContext) -> TrainedTrial:
    """Train a trial's plan from its initial weights; the search for them counts as search."""
    started, plan = time.perf_counter(), trial.plan
    pairs = initial_factors(trial)
    adapted = trial.attach(plan)
    callback = begin(adapted, plan, pairs)
    b_at_start = {name: layer.lora_B[ADAPTER].weight.detach().clone() for name, layer in lora_layers(adapted).items()}
    seconds = time.perf_counter() - started
    result = trial.train(adapted, callback)
    audit_moved(adapted, b_at_start)
    return TrainedTrial(
        model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters, search_seconds=seconds
    )


def begin(adapted: nn.Module, plan: RankPlan, pairs: Mapping[str, Pair]) -> TrainerCallback:
    """Copy initial factors into LoRA layers; return the callback that keeps the constant halves.

    Args:
        adapted: LoRA layers of `plan.built`.
        plan: plan of the trained ranks.
        pairs: site name -> its initial A and B.
    """
    layers = lora_layers(adapted)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = pairs[name]
            if plan.init.is_subtracted:
                a, b = torch.cat([a, a]), torch.cat([b, -b], dim=1)
            layer.lora_A[ADAPTER].weight.copy_(a)
            layer.lora_B[ADAPTER].weight.copy_(b)
    start_magnitudes(adapted)  # type: ignore[arg-type]
    return ConstantHalves(list(layers.values())) if plan.init.is_subtracted else TrainerCallback()


class ConstantHalves(TrainerCallback):
    """Callback that keeps the second half of every A and B: no gradient reaches it, and no weight decay changes it."""

    def __init__(self, layers: Sequence[Any]) -> None:
        """Hold the layers' weights; their gradients lose the second half from now on."""
        self._whole: list[tuple[nn.Parameter, int]] = []
        for layer in layers:
            for side, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
                weight = side[ADAPTER].weight
                self._whole.append((weight, dim))
                if weight.requires_grad:
                    weight.register_hook(_first_half(dim))
        self._kept: list[torch.Tensor] = []

    def _halves(self) -> list[torch.Tensor]:
        return [weight.detach().chunk(2, dim)[1] for weight, dim in self._whole]

    def start(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Copy the constant halves, which all processes have alike by now."""
        self._kept = [half.clone() for half in self._halves()]

    def stepped(self, step: int, *, taken: bool) -> None:
        """Undo weight decay."""
        torch._foreach_copy_(self._halves(), self._kept)

    def state(self) -> dict[str, Any]:
        """Return the constant halves."""
        return {"constant": self._kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the constant halves of a snapshot, so that a training goes on from the same function."""
        self._kept = [kept.to(half) for kept, half in zip(state["constant"], self._halves(), strict=True)]


def _first_half(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def cut(gradient: torch.Tensor) -> torch.Tensor:
        trained, constant = gradient.chunk(2, dim)
        return torch.cat([trained, torch.zeros_like(constant)], dim)

    return cut


# --- factors


@torch.no_grad()
def initial_factors(trial: TrialContext) -> dict[str, Pair]:
    """Return site name -> initial A and B of its plan's start.

    Raises:
        AllocationError: there are too few inputs for this number of directions, or they did not converge (EVA).
    """
    plan = trial.plan
    if plan.init is Start.EVA:
        return _eva(trial)
    if plan.init in _MEASURED:
        return _measured(trial, _MEASURED[plan.init])
    full = _full_weights(trial) if plan.init is Start.LOFTQ else {}
    found = {}
    for entry in plan.entries:
        name, scale = entry.site.name, plan.scale_of(entry)
        if plan.init is Start.ORTHOGONAL:
            found[name] = orthogonal(trial.seed, entry)
            continue
        weight = weight_of(trial.base.get_submodule(name))
        if plan.init is Start.OLORA:
            found[name] = olora(weight, entry.rank)
        elif plan.init is Start.PISSA:
            found[name] = principal(weight, entry.rank, scale)
        else:
            error = full[name].to(weight.device) - weight
            found[name] = principal(error, entry.rank, scale) if error.any() else _plain(trial, entry)
    return found


def principal(matrix: torch.Tensor, rank: int, scale: float) -> Pair:
    """Return the factors of the best rank-r approximation: scale · B·A, with equal norms (PiSSA, eq. 2 and 3).

    LoftQ's are those of what a weight lost when it was stored in 4 bit, at one alternating step, so that the stored
    weight stays as it is. PEFT's LoftQ leaves out LoRA's scale, which only its alpha = rank makes 1.

    Args:
        matrix: shape (out, in), float32.
        rank: number of components.
        scale: factor of B·A in the model.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora(weight: torch.Tensor, rank: int) -> Pair:
    """Return the first columns of Q as B and the first rows of R as A, of the weight's QR decomposition."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def orthogonal(seed: int, entry: SiteRank) -> Pair:
    """Return A and B of half the rank each, in orthogonal subspaces of it, so that B·A = 0 and neither is zero.

    As PEFT's, from the seed's stream of the site.
    """
    rng, rank, site = rng_for(seed, "orthogonal", entry.site.name), entry.rank, entry.site

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    basis, _ = torch.linalg.qr(normal(rank, rank))
    a = basis[0::2].T @ normal(rank // 2, site.in_features)
    b = normal(site.out_features, rank // 2) @ basis[1::2]
    return (a / 10).float(), (b / 10).float()


def lora_ga(gradient: torch.Tensor, rank: int) -> Pair:
    """Return the first r right singular vectors of the gradient as A and the left ones from r to 2r as B.

    Both are multiplied by out^(1/4) / sqrt(gamma) (2407.05000, section 3.3, and its published code). PEFT 0.21
    multiplies B alone, and by the gradient's singular values, which depend on the size of the loss.

    Args:
        gradient: gradient of the mean loss by the weight, shape (out, in).
        rank: number of components; twice as many are at most the smaller side.
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    factor = gradient.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return right[:rank] * factor, left[:, rank : 2 * rank] * factor


def corda(weight: torch.Tensor, covariance: torch.Tensor, rank: int, scale: float) -> Pair:
    """Return the principal factors of W·C, of which A is multiplied by C⁻¹ (2406.05223, instruction-previewed mode).

    Args:
        weight: shape (out, in).
        covariance: C, shape (in, in), of the site's inputs.
        rank: number of components.
        scale: factor of B·A in the model.
    """
    damped = covariance.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    a, b = principal(weight.double() @ damped, rank, scale)
    return torch.linalg.solve(damped, a.T).T.float(), b.float()


# --- statistics of calibration data


class _Gradient(HalfSums):
    """Statistic that sums a site's gradient; the factors are kept under the site's name."""

    floats = 2

    def __init__(self, keep: dict[str, Pair], entry: SiteRank, weight: torch.Tensor, scale: float) -> None:
        super().__init__()
        self._keep, self._entry = keep, entry

    def finish(self) -> Measures:
        self._keep[self._entry.site.name] = lora_ga(self.means().stack[0], self._entry.rank)
        return ZERO, ZERO, ZERO


class _Covariance:
    """Statistic: mean over examples of XᵀX, each divided by its largest input, as in CorDA's code and PEFT."""

    floats = 1

    def __init__(self, keep: dict[str, Pair], entry: SiteRank, weight: torch.Tensor, scale: float) -> None:
        self._keep, self._entry, self._weight, self._scale = keep, entry, weight, scale
        width = entry.site.in_features
        self._sum, self._examples = torch.zeros(width, width, device=weight.device), 0

    def add(self, rows: SiteRows) -> None:
        lengths = list(rows.lengths)
        for inputs, counted in zip(rows.inputs.split(lengths), rows.mask.split(lengths), strict=True):
            shown = inputs[counted]
            shown = shown / shown.max().abs().clamp(min=torch.finfo(shown.dtype).tiny)
            self._sum += shown.T @ shown
            self._examples += 1

    def finish(self) -> Measures:
        covariance, entry = self._sum / self._examples, self._entry
        self._keep[entry.site.name] = corda(self._weight, covariance, entry.rank, self._scale)
        return ZERO, ZERO, ZERO


_MEASURED: Mapping[Start, Any] = {Start.CORDA: _Covariance, Start.LORA_GA: _Gradient}


def _measured(trial: TrialContext, kind: Any) -> dict[str, Pair]:
    """Return the factors that calibration data give; sites that no data reach start as plain LoRA."""
    plan, found = trial.plan, dict[str, Pair]()
    entries = {entry.site.name: entry for entry in plan.entries}

    def make(site: AdapterSite) -> Statistic[Measures]:
        entry = entries[site.name]
        made: Statistic[Measures] = kind(
            found, entry, weight_of(trial.base.get_submodule(site.name)), plan.scale_of(entry)
        )
        return made

    measure_sites(
        dataclasses.replace(trial.profile_task(), sites=[entry.site for entry in plan.entries]),
        make,
        floats=lambda site: kind.floats * site.in_features * max(site.in_features, site.out_features),
        backward=kind is _Gradient,
    )
    return {name: found.get(name) or _plain(trial, entry) for name, entry in entries.items()}


def _eva(trial: TrialContext) -> dict[str, Pair]:
    """Return the leading directions of the inputs as A, by PEFT, and B zero."""
    from adaptive_lora.methods.eva.fit import EvaSettings, directions

    entries = trial.plan.entries
    found = directions(trial, EvaSettings(rank=max(entry.rank for entry in entries), rho=1.0, tau=0.99))
    return {entry.site.name: (found.a[entry.site.name][: entry.rank], _zeros(entry)) for entry in entries}


def _plain(trial: TrialContext, entry: SiteRank) -> Pair:
    """Return the factors of plain LoRA: A of the seed, B zero."""
    return trial.initial_a(entry), _zeros(entry)


def _zeros(entry: SiteRank) -> torch.Tensor:
    return torch.zeros(entry.site.out_features, entry.rank)


def _full_weights(trial: TrialContext) -> dict[str, torch.Tensor]:
    """Return the weights of the plan's sites before they were stored in 4 bit, read from the base once more."""
    from adaptive_lora.models.base import load_base

    context = trial.context
    base: Any = load_base(context.config.model, context.runtime.base_dtype, context.base.task).model
    return {entry.site.name: weight_of(base.get_submodule(entry.site.name)) for entry in trial.plan.entries}
