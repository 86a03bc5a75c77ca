"""EVA: ranks and A from the variance of each site's inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.allocation import MethodSpec, RankPlan
from adaptive_lora.allocation.limits import rank_limits
from adaptive_lora.allocation.revised import rank_budget, revised
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch
from adaptive_lora.methods.adapters import audit_moved
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.base import TrainedTrial, TrialContext
from adaptive_lora.methods.eva import Eva
from adaptive_lora.methods.eva.directions import Counted, Directions, EvaSettings, eva_directions
from adaptive_lora.methods.importance.capture import frozen, positions_mask
from adaptive_lora.methods.importance.passes import joined
from adaptive_lora.models.tasks import CausalTask

_USED_SHARE = 0.9
"""Minimum share of the calibration tokens that EVA must use; batches that are too short are skipped."""


def fit_eva(options: Eva, trial: TrialContext) -> TrainedTrial:
    """Measure the inputs, attach EVA's ranks, initialise A with its directions, train."""
    started = time.perf_counter()
    plan, directions = _measured(trial, options)
    adapted = trial.attach(plan)
    if options.init == "own":
        with torch.no_grad():
            for name, layer in lora_layers(adapted).items():
                layer.lora_A[ADAPTER].weight.copy_(directions.a[name][: layer.r[ADAPTER]])
    seconds = time.perf_counter() - started
    result = trial.train(adapted)
    audit_moved(adapted)
    return TrainedTrial(
        model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters, search_seconds=seconds
    )


def _measured(trial: TrialContext, options: Eva) -> tuple[RankPlan, Directions]:
    """Return EVA's plan, and at least as many directions per site as its rank."""
    plan = trial.plan
    sites = [entry.site for entry in plan.entries]
    limits = rank_limits(trial.method, sites, least=0)
    if options.ranks == "uniform":
        ranks = [limits.clipped(entry.rank, index) for index, entry in enumerate(plan.entries)]
        found = _directions(trial, EvaSettings(rank=max(ranks), rho=1.0, tau=options.tau))
        return _with_ranks(plan, ranks), found
    costs = [site.parameters_per_rank for site in sites]
    limited = limits != rank_limits(MethodSpec(options=options), sites, least=0)
    if plan.budget is None and not limited:  # as in the paper: PEFT distributes the ranks
        settings = EvaSettings(rank=options.rank, rho=options.rho, tau=options.tau)
        found = _directions(trial, settings)
        return _with_ranks(plan, [len(found.a[site.name]) for site in sites]), found
    if plan.budget is None:  # the budget is a number of ranks
        costs, budget = [1] * len(sites), options.rank * len(sites)
    else:
        budget = rank_budget(plan)
    most = max(1, math.ceil(options.rho * budget / sum(costs)))
    found = _directions(trial, EvaSettings(rank=most, rho=1.0, tau=options.tau))
    explained = [found.explained[site.name] for site in sites]
    ranks = limits.by_value(explained, costs, budget, one_threshold=False)
    return _with_ranks(plan, ranks), found


def _with_ranks(plan: RankPlan, ranks: Sequence[int]) -> RankPlan:
    names = [entry.site.name for entry in plan.entries]
    return revised(plan, dict(zip(names, ranks, strict=True)))


def _directions(trial: TrialContext, settings: EvaSettings) -> Directions:
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
