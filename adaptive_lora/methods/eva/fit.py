"""EVA's ranks and directions, computed by PEFT: the singular vectors of each site's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora.eva import HashHook, SVDHook
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import MethodSpec, RankPlan
from adaptive_lora.allocation.allocate import rank_limits
from adaptive_lora.allocation.plan import rank_budget, revised
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.attach import peft_task, stores_transposed
from adaptive_lora.methods.base import TrialContext
from adaptive_lora.methods.eva import Eva
from adaptive_lora.methods.importance.capture import frozen, positions_mask
from adaptive_lora.methods.importance.passes import joined
from adaptive_lora.models.tasks import CausalTask

_USED_SHARE = 0.9
"""Minimum share of the calibration tokens that EVA must use; batches that are too short are skipped."""
Counted = Callable[[Batch, torch.Tensor], torch.Tensor]
"""Function from a batch and a site's inputs (B, T, in) to the mask (B, T) of positions that count."""
_PASSES_PER_BATCH = 100
"""Maximum number of passes per batch; PEFT itself cycles until every direction has converged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaSettings:
    """Settings of the search for directions."""

    rank: int
    """Mean rank over sites."""
    rho: float
    """Ratio of a site's maximum rank to `rank`; 1: `rank` directions at every site."""
    tau: float

    @property
    def components(self) -> int:
        """Number of directions to find at each site."""
        return round(self.rank * self.rho)


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """Directions found by PEFT."""

    a: Mapping[str, torch.Tensor]
    """Site name -> singular vectors, shape (rank, in), in falling order; as many as EVA's rank there."""
    explained: Mapping[str, tuple[float, ...]]
    """Site name -> share of the inputs' variance explained by each direction."""


def measured(trial: TrialContext, options: Eva) -> tuple[RankPlan, Directions]:
    """Return EVA's plan, and at least as many directions per site as its rank."""
    plan = trial.plan
    sites = [entry.site for entry in plan.entries]
    limits = rank_limits(trial.method, sites, least=0)
    if options.ranks == "uniform":
        ranks = [limits.clipped(entry.rank, index) for index, entry in enumerate(plan.entries)]
        found = directions(trial, EvaSettings(rank=max(ranks), rho=1.0, tau=options.tau))
        return _with_ranks(plan, ranks), found
    costs = [site.parameters_per_rank for site in sites]
    limited = limits != rank_limits(MethodSpec(options=options), sites, least=0)
    if plan.budget is None and not limited:  # as in the paper: PEFT distributes the ranks
        settings = EvaSettings(rank=options.rank, rho=options.rho, tau=options.tau)
        found = directions(trial, settings)
        return _with_ranks(plan, [len(found.a[site.name]) for site in sites]), found
    if plan.budget is None:  # the budget is a number of ranks
        costs, budget = [1] * len(sites), options.rank * len(sites)
    else:
        budget = rank_budget(plan)
    most = max(1, math.ceil(options.rho * budget / sum(costs)))
    found = directions(trial, EvaSettings(rank=most, rho=1.0, tau=options.tau))
    explained = [found.explained[site.name] for site in sites]
    ranks = limits.by_value(explained, costs, budget, one_threshold=False)
    return _with_ranks(plan, ranks), found


def _with_ranks(plan: RankPlan, ranks: Sequence[int]) -> RankPlan:
    names = [entry.site.name for entry in plan.entries]
    return revised(plan, dict(zip(names, ranks, strict=True)))


def directions(trial: TrialContext, settings: EvaSettings) -> Directions:
    """Return the directions of the inputs of a trial's sites, on its calibration data."""
    context = trial.context
    causal = isinstance(context.task, CausalTask)

    def run(model: nn.Module, batch: Batch) -> Any:
        with torch.no_grad(), context.runtime.accelerator.autocast():
            return model(**batch.inputs)

    def counted(site: AdapterSite) -> Counted:
        if causal:  # as in EVA: the positions with supervised predictions
            return lambda batch, rows: batch.supervised
        return lambda batch, rows: positions_mask(batch, site, rows)

    with frozen(trial.base):
        sites = {entry.site.name: counted(entry.site) for entry in trial.plan.entries}
        return eva_directions(trial.base, sites, _batches(trial, settings, causal), settings, run)


def _batches(trial: TrialContext, settings: EvaSettings, causal: bool) -> Sequence[Batch]:
    """Return calibration batches, merged only as far as needed to have enough tokens in each.

    PEFT compares the inputs of all sites on the first batch as Python numbers, so it should be small.
    """
    calibration, needed = trial.calibration(), 2 * settings.components

    def size(batch: Batch) -> int:
        return batch.supervised_tokens if causal else batch.tokens

    tokens = sum(map(size, calibration))
    for limit in (0, 512, 1024, 2048, 4096, 2**62):
        passes = joined(calibration, limit=limit)
        enough = [batch for batch in passes if size(batch) >= needed]
        if sum(map(size, enough)) >= _USED_SHARE * tokens:
            return enough
    return passes


def eva_directions(
    model: nn.Module,
    sites: Mapping[str, Counted],
    batches: Sequence[Batch],
    settings: EvaSettings,
    run: Callable[[nn.Module, Batch], Any],
) -> Directions:
    """Return EVA's initial A of every site; the model is not changed.

    Args:
        model: base without adapters, in evaluation mode.
        sites: module name -> function that selects the positions of its inputs.
        batches: batches to run the model on, at least one.
        settings: ranks and tolerance.
        run: function that runs the model on a batch.

    Raises:
        AllocationError: there are too few inputs for this number of directions, or they did not converge.
    """
    _check_widths(model, sites, settings)
    hooks, first = dict[str, SVDHook](), dict[str, HashHook]()
    passes = 0

    def watched(module: nn.Module, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        if passes > _PASSES_PER_BATCH * len(batches):
            raise AllocationError(
                f"EVA's directions have not converged after {passes - 1} passes; lower tau "
                f"(now {settings.tau:g}) or raise profile_batches."
            )
        for name in sites:
            for hook in module.get_submodule(name)._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    hooks[name] = hook
                elif isinstance(hook, HashHook):
                    first[name] = hook
        return run(module, batch)

    with _hooks_removed(model, sites):
        found = get_eva_state_dict(
            model,
            batches,
            _config(model, tuple(sites), settings),
            watched,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=_counted_rows(sites, settings),
            show_progress_bar=False,
            gather_distributed_inputs=False,  # all processes have the same batches
        )
    shown = {name: hook.hashed_inputs[0] for name, hook in first.items()}
    owner = {shown[name]: hook for name, hook in hooks.items()}
    return Directions(
        a={name: found[name].float() for name in sites},
        explained={name: tuple(owner[shown[name]].svd.explained_variance_ratio_.tolist()) for name in sites},
    )


def _counted_rows(sites: Mapping[str, Counted], settings: EvaSettings) -> Callable[[Any, Batch, str], torch.Tensor]:
    """Return a function that gives PEFT the selected rows (positions, in) of a site's inputs."""
    needed = 2 * settings.components  # PEFT's incremental SVD keeps twice the requested number

    def rows_of(inputs: Any, batch: Batch, name: str) -> torch.Tensor:
        rows: torch.Tensor = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
        rows = rows.reshape(batch.examples, -1, rows.shape[-1])
        chosen = rows[sites[name](batch, rows)]
        if len(chosen) < needed:
            raise AllocationError(
                f"EVA looks for {settings.components} directions and needs {needed} tokens per "
                f"calibration batch; {name} saw {len(chosen)}. Raise profile_batches or "
                "profile_batch_size, or lower rank or rho."
            )
        return chosen

    return rows_of


def _config(model: nn.Module, sites: Sequence[str], settings: EvaSettings) -> LoraConfig:
    return LoraConfig(
        task_type=peft_task(model),
        r=settings.rank,
        target_modules=list(sites),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=settings.rho, tau=settings.tau),
        fan_in_fan_out=stores_transposed(model, sites),
    )


def _check_widths(model: nn.Module, sites: Iterable[str], settings: EvaSettings) -> None:
    """Check that sites are wide enough for PEFT's incremental SVD, which keeps twice the requested vectors."""
    modules = dict(model.named_modules())
    narrow = min(int(m.weight.shape[0]) if isinstance(m := modules[n], Conv1D) else m.in_features for n in sites)
    if 2 * settings.components > narrow:
        raise AllocationError(
            f"EVA looks for {settings.components} directions and needs twice as many inputs per "
            f"site; the narrowest has {narrow}. Lower rank or rho."
        )


@contextmanager
def _hooks_removed(model: nn.Module, sites: Iterable[str]) -> Iterator[None]:
    """Remove PEFT's hooks at the end of the block, also after an interruption."""
    try:
        yield
    finally:
        for name in sites:
            hooks = model.get_submodule(name)._forward_hooks
            for key, hook in list(hooks.items()):
                if isinstance(hook, SVDHook | HashHook):
                    del hooks[key]
