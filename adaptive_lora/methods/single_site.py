"""One adapter alone: the whole budget at a single site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.budget import check_budget
from adaptive_lora.allocation.plan import RankPlan, rank_budget, uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod, TrainedTrial, TrialContext
from adaptive_lora.methods.ranks_in_training import RanksInTraining
from adaptive_lora.options import option


def adapter_gradient_energy(sites: Sequence[AdapterSite], gradient_norms: Mapping[str, float]) -> list[float]:
    """Return PAGE up to a common factor: the expected squared gradient norm of each site's B before training.

    With B = 0 the gradient of B is s·G·Aᵀ, whose squared norm is s²·r·||G||²/(3·in) on average over PEFT's
    initial A. PAGE is the projected adapter gradient energy of DomLoRA (2605.06183).

    Args:
        sites: sites, all to be compared at one rank and factor.
        gradient_norms: site name -> Frobenius norm of the mean gradient G of its weight.
    """
    return [gradient_norms[site.name] ** 2 / site.in_features for site in sites]


def spent_in_order(order: Sequence[int], problem: AllocationProblem, budget: int) -> tuple[int, ...]:
    """Return ranks that spend a budget on the sites of an order, each up to its limit before the next."""
    ranks, step = list(problem.lower), problem.multiple
    left = budget - check_budget(problem.costs, problem.lower, problem.upper, budget)
    for index in order:
        units = min(left // (problem.costs[index] * step), (problem.upper[index] - ranks[index]) // step)
        ranks[index] += step * units
        left -= step * units * problem.costs[index]
    return tuple(ranks)


@dataclass(frozen=True, kw_only=True)
class DomLora(RankMethod):
    """DomLoRA (2605.06183): one adapter, at the site with the largest projected adapter gradient energy.

    In the paper this is a feed-forward down projection of a shallow layer, the same one over tasks. Departure: the
    paper keeps LoRA's rank and so trains few parameters; here the adapter has the budget of the other methods, and
    what is above the smaller side of the site goes to the site with the next largest energy.
    """

    name: ClassVar[str] = "domlora"
    least_rank: ClassVar[int | None] = 0
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)

    @property
    def metric(self) -> str | None:
        """Name of the importance profile that gives the energies."""
        return "gradient_norm"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the whole budget at one site.

        Raises:
            AllocationError: there is no profile.
        """
        if problem.profile is None:
            raise AllocationError(
                "domlora needs a gradient_norm profile; none was given (`adaptive-lora profile` writes one)."
            )
        budget = uniform_cost(problem.sites, self.rank) if problem.budget is None else problem.budget
        energies = adapter_gradient_energy(problem.sites, problem.profile.scores)
        order = sorted(range(len(energies)), key=lambda index: -energies[index])
        return Solution(ranks=spent_in_order(order, problem, budget), budget=budget)


@dataclass(frozen=True, kw_only=True)
class SingleSite(RanksInTraining):
    """The best single site, by training: the whole budget at one site after the other.

    Trains one adapter at each of the sites with the most projected adapter gradient energy (PAGE, 2605.06183), from
    scratch, and keeps the one with the lowest validation loss. Ranks above the smaller side of a site go to the next.
    """

    name: ClassVar[str] = "single_site"
    candidates: int = option(4, "number of sites to train, those with the most energy first", limits=RANK, label="of{}")

    @property
    def trainings(self) -> int:  # type: ignore[override]
        """Number of full trainings: one per candidate."""
        return self.candidates

    def check(self, plan: RankPlan) -> None:
        """Refuse more candidates than there are sites."""
        if self.candidates > len(plan.entries):
            raise AllocationError(
                f"{plan.method}: required at most {len(plan.entries)} candidates, the number of sites; "
                f"got {self.candidates}."
            )

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train each candidate and keep the best on validation data."""
        from adaptive_lora.methods.adapters.candidates import attach_best, search_problem, train_ranks

        problem, profile = search_problem(trial), trial.profile("gradient_norm")
        energies = adapter_gradient_energy(problem.sites, profile.scores)
        order = sorted(range(len(energies)), key=lambda index: -energies[index])
        trained = []
        for first in order[: self.candidates]:
            ranks = spent_in_order([first, *order], problem, rank_budget(trial.plan))
            trained.append(train_ranks(trial, ranks, trainings=self.trainings))
        adapted, number = attach_best(trial, trained)
        best = trained[number]
        return TrainedTrial(
            model=adapted,
            plan=best.plan,
            result=best.result,
            training_parameters=best.plan.trainable_parameters,
            search_seconds=profile.seconds + sum(each.result.seconds for each in trained) - best.result.seconds,
            extra={"single_site/candidate": float(number)},
        )
