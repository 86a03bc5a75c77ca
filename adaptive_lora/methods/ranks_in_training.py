"""Methods that find ranks in training: their budget, their starting plan, and the phases of their decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from adaptive_lora.allocation.plan import RankPlan, equal_rank, start_rank, uniform_cost
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankEvent, RankMethod, TrainerCallback
from adaptive_lora.options import Limits, option

_SHARE = Limits(low=0, high=0.9)
"""Limits of a share of the training without rank changes."""


@dataclass(frozen=True, kw_only=True)
class RanksInTraining(RankMethod):
    """A method whose plan only sets the budget, by equal ranks; training decides the final ranks."""

    ranks_in_training: ClassVar[bool] = True
    refused_variants: ClassVar[Mapping[str, str]] = {
        "lora_fa": "it changes A where it changes ranks",
        "alora": "it reads which ranks matter from all tokens",
        "experts": "it reads A and B of linear layers while it decides, not those of stacked experts",
    }
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks with the parameters of uniform rank `rank`."""
        return RankRequest(ranks=(1.0,) * len(sites), budget=uniform_cost(sites, self.rank))


@dataclass(frozen=True, kw_only=True)
class StartsAboveBudget(RanksInTraining):
    """A method that trains every site at one rank above the budget, and prunes down to that."""

    start_factor: ClassVar[float]
    """Ratio of the starting rank to the uniform rank of the budget."""
    start_rank: int | None = option(
        None,
        "rank of every site at the start; none: 1.5 times (adalora) or twice (truncate) the uniform rank of the budget",
        limits=RANK,
        label="from{}",
    )

    def start_plan(self, plan: RankPlan) -> RankPlan:
        """Return the starting plan: the same rank at every site, above the budget.

        Raises:
            AllocationError: the starting plan is not above the budget, or does not fit the sites.
        """
        return equal_rank(plan, start_rank(plan, self.start_rank, self.start_factor))

    def check(self, plan: RankPlan) -> None:
        """Check the starting plan."""
        self.start_plan(plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """Phases of a training with rank changes, in optimiser steps from 1."""

    steps: int
    """Number of optimiser steps of the whole training."""
    warmup: int
    """Last step before ranks may change."""
    settle: int
    """Step of the last change, after which ranks are final."""
    interval: int
    """Number of steps between two changes."""

    @classmethod
    def of(cls, steps: int, *, warmup_share: float, final_share: float, interval: int) -> Phases:
        """Return the phases of a training of `steps` steps.

        Raises:
            AllocationError: the training has a single step, before which nothing can be measured.
        """
        if steps < 2:
            raise AllocationError(
                f"ranks are decided in training, which needs at least 2 optimiser steps; got "
                f"{steps}. Raise epochs or max_steps."
            )
        settle = max(2, steps - round(final_share * steps))
        return cls(steps=steps, warmup=min(round(warmup_share * steps), settle - 1), settle=settle, interval=interval)

    def due(self, step: int) -> bool:
        """Return whether ranks are changed after this step."""
        return step == self.settle or (self.warmup < step < self.settle and step % self.interval == 0)


@dataclass(frozen=True, kw_only=True)
class DecidesInPhases(RanksInTraining):
    """A method that changes ranks at intervals, between a warmup and a final part of the training."""

    holds_limits: ClassVar[bool] = False
    decisions: ClassVar[int]
    """Number of intervals in a training, where none is given."""
    warmup_share: float = option(
        0.1, "share of the steps before the first change of ranks", limits=_SHARE, label="warm{:g}"
    )
    final_share: float = option(
        0.4, "share of the steps after the last change of ranks", limits=_SHARE, label="final{:g}"
    )
    interval: int | None = option(
        None,
        "optimiser steps between two decisions on ranks; none: a hundredth (adalora) or twentieth (grow_prune) of the "
        "training",
        unit="steps",
        limits=Limits(low=1),
        label="every{:g}",
    )

    def phases(self, steps: int) -> Phases:
        """Return the phases of rank changes in a training of `steps` steps."""
        return Phases.of(
            steps,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
            interval=self.interval or max(1, steps // self.decisions),
        )


class RankChanges(TrainerCallback):
    """Callback of a method that decides in phases: the history of its ranks."""

    phases: Phases
    history: list[RankEvent]

    def ranks(self) -> dict[str, int]:
        """Return site name -> current rank."""
        raise NotImplementedError

    def record(self, step: int) -> None:
        """Add the current ranks to the history."""
        self.history.append(RankEvent(step=step, ranks=self.ranks()))

    def settled(self, step: int) -> bool:
        """Return whether the last change is done."""
        return step >= self.phases.settle

    def state(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": [[event.step, event.ranks] for event in self.history]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the history."""
        self.history = [RankEvent(step=step, ranks=ranks) for step, ranks in state["history"]]
