"""A plan with other ranks: what is left after training has decided where ranks go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from adaptive_lora.allocation.plan import RankPlan, SiteRank
from adaptive_lora.allocation.scaling import Scaling
from adaptive_lora.errors import AllocationError


def revised(plan: RankPlan, ranks: Mapping[str, int]) -> RankPlan:
    """Return the plan with these ranks; alpha follows by its policy, rank 0 is left out.

    Args:
        plan: gives sites, alpha, label and budget.
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
    """Return the plan with one rank at every site, less where a site's smaller side is.

    It is the plan of a training whose ranks are revised at its end: they keep `trained_rank`.
    """
    ranks = {entry.site.name: min(rank, entry.site.max_rank) for entry in plan.entries}
    return dataclasses.replace(revised(plan, ranks), trained_rank=rank)


def budget_of(plan: RankPlan) -> int:
    """Return the parameters that the final adapter may have."""
    return plan.trainable_parameters if plan.budget is None else plan.budget


def rank_budget(plan: RankPlan) -> int:
    """Return what of the budget is for ranks: all but the magnitudes of DoRA."""
    return budget_of(plan) - plan.magnitudes


def start_rank(plan: RankPlan, wanted: int | None, factor: float) -> int:
    """Return the uniform rank at which a method starts that ends at the plan's budget.

    Args:
        plan: what the method must end at.
        wanted: the user's choice; None: `factor` times the uniform rank of the budget, rounded up.
        factor: above 1.

    Raises:
        AllocationError: at this rank the start is not above the budget, so nothing can be decided.
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
