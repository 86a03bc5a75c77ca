"""Allocations that are trained one after the other, of which the best on validation data is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.allocate import rank_limits
from adaptive_lora.allocation.plan import rank_budget, revised
from adaptive_lora.allocation.problem import AllocationProblem
from adaptive_lora.methods.adapters.attach import read_head, write_head
from adaptive_lora.methods.adapters.audit import audit_moved
from adaptive_lora.methods.adapters.factors import Factors, read_factors, write_factors
from adaptive_lora.results import TrainResult

if TYPE_CHECKING:
    from adaptive_lora.methods.base import TrialContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An allocation that was trained from the seed's initial weights, without the base."""

    plan: RankPlan
    result: TrainResult
    factors: Mapping[str, Factors]
    """Site name -> trained factors."""
    head: Mapping[str, torch.Tensor]
    """Trained tensors of the task's head."""


def search_problem(trial: TrialContext) -> AllocationProblem:
    """Return the problem of a trial's final ranks: its sites, limits from rank 0 on, and its budget."""
    sites = tuple(entry.site for entry in trial.plan.entries)
    limits = rank_limits(trial.method, sites, least=0)
    return AllocationProblem(
        sites=sites, lower=limits.lower, upper=limits.upper, multiple=limits.multiple, budget=rank_budget(trial.plan)
    )


def train_ranks(trial: TrialContext, ranks: Sequence[int], *, trainings: int) -> Candidate:
    """Train an allocation and take it off the base.

    Args:
        trial: context of the trial.
        ranks: rank of every site of its plan.
        trainings: total number of trainings of the method.
    """
    names = (entry.site.name for entry in trial.plan.entries)
    plan = revised(trial.plan, dict(zip(names, ranks, strict=True)))
    adapted = trial.attach(plan)
    result = trial.train(adapted, trainings=trainings)
    audit_moved(adapted)
    found = Candidate(plan=plan, result=result, factors=read_factors(adapted), head=read_head(adapted, trial.head))
    trial.release()
    return found


def attach_best(trial: TrialContext, candidates: Sequence[Candidate]) -> tuple[Any, int]:
    """Put the candidate with the lowest validation loss on the base; the first of equal ones.

    Returns:
        The PEFT model with its trained weights, and the candidate's number, from 0.
    """
    number = min(range(len(candidates)), key=lambda i: candidates[i].result.validation_loss)
    best = candidates[number]
    adapted = trial.attach(best.plan)
    write_factors(adapted, best.factors)
    write_head(adapted, best.head, trial.head)
    return adapted, number
