"""A plan with revised ranks, for methods that change ranks in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from adaptive_lora.allocation.plan import RankPlan, SiteRank
from adaptive_lora.allocation.scaling import Scaling
from adaptive_lora.errors import AllocationError


def revised(plan: RankPlan, ranks: Mapping[str, int]) -> RankPlan:
    """Return the plan with these ranks; alpha follows the scaling policy, and sites of rank 0 have no entry.

    Args:
        plan: source of sites, alpha, label and budget.
        ranks: site name -> rank, for every site of the plan.
    """
    names = [entry.site.name for entry in plan.entries]
    return dataclasses.replace(
        plan,
        entries=tuple(
            _with_rank(plan.scaling, entry, ranks[entry.site.name])
            for entry in plan.entries
            if ranks[entry.site.name] > 0
        ),
        left_out=(*plan.left_out, *(name for name in names if not ranks[name])),
    )


def _with_rank(scaling: Scaling, entry: SiteRank, rank: int) -> SiteRank:
    alpha = scaling.at_rank(entry.alpha, entry.rank, rank)
    return dataclasses.replace(entry, rank=rank, alpha=alpha)


def equal_rank(plan: RankPlan, rank: int) -> RankPlan:
    """Return the plan with the same rank at every site, limited by a site's smaller side.

    This is the plan of a training whose ranks are revised at its end; the revised plan keeps this
    rank as `trained_rank`.
    """
    ranks = {entry.site.name: min(rank, entry.site.max_rank) for entry in plan.entries}
    return dataclasses.replace(revised(plan, ranks), trained_rank=rank)


def budget_of(plan: RankPlan) -> int:
    """Return the maximum number of parameters of the final adapter."""
    return plan.trainable_parameters if plan.budget is None else plan.budget


def rank_budget(plan: RankPlan) -> int:
    """Return the number of parameters of the budget that ranks may use: all but DoRA's magnitudes."""
    return budget_of(plan) - plan.magnitudes


def start_rank(plan: RankPlan, wanted: int | None, factor: float) -> int:
    """Return the uniform starting rank of a method that prunes down to the plan's budget.

    Args:
        plan: final plan, with the budget to reach.
        wanted: the user's choice; None: `factor` times the uniform rank of the budget, rounded up.
        factor: multiple of the budget's uniform rank, above 1.

    Raises:
        AllocationError: this rank costs no more than the budget, so nothing would be pruned.
    """
    budget = budget_of(plan)
    per_rank = sum(entry.site.parameters_per_rank for entry in plan.entries)
    rank = math.ceil(factor * rank_budget(plan) / per_rank) if wanted is None else wanted
    cost = equal_rank(plan, rank).trainable_parameters
    if cost <= budget:
        raise AllocationError(
            f"{plan.method} starts with {cost:,} parameters (rank {rank} at every site), which its "
            f"budget of {budget:,} already holds: nothing would be cut. Required a start above the "
            "budget; raise start_rank or lower the budget."
        )
    return rank
