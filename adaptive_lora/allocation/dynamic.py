"""Methods that decide ranks during training, under the budget of their plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.plan import RankPlan, uniform_cost
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.revised import equal_rank, start_rank
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.options import Limits, option

_START_FACTOR = 1.5
"""AdaLoRA's rank at the start over the uniform rank of the budget, as in the paper."""
_SHARE = Limits(low=0, high=0.9)
_INTERVAL = "optimiser steps between two decisions; none: a {} of the training"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """When ranks may change, in optimiser steps from 1."""

    steps: int
    """Of the whole training."""
    warmup: int
    """No rank changes up to this step."""
    settle: int
    """The last change; from here on the ranks are final."""
    interval: int
    """Steps between two changes."""

    @classmethod
    def of(cls, steps: int, *, warmup_share: float, final_share: float, interval: int) -> Phases:
        """Divide a training of so many steps.

        Raises:
            AllocationError: one step, before which nothing could be measured.
        """
        if steps < 2:
            raise AllocationError(
                f"ranks are decided in training, which needs at least 2 optimiser steps; got "
                f"{steps}. Raise epochs or max_steps."
            )
        settle = max(2, steps - round(final_share * steps))
        return cls(steps=steps, warmup=min(round(warmup_share * steps), settle - 1), settle=settle, interval=interval)

    def due(self, step: int) -> bool:
        """Return whether ranks are decided after this step."""
        return step == self.settle or (self.warmup < step < self.settle and step % self.interval == 0)


@dataclass(frozen=True, kw_only=True)
class AdaLora:
    """AdaLoRA (Zhang et al. 2023, 2303.10512) through PEFT, folded into plain LoRA at the end.

    Updates P·diag(E)·Q start at a higher rank. Every `interval` steps the triplets with the largest
    smoothed sensitivity times its uncertainty (section 3.2) stay, under a number of ranks that
    falls as a cubic (section 3.3). Departure: the target of that schedule is no fixed number of
    ranks but as many of the best triplets as the budget of parameters holds. alpha / rank is that
    of the start throughout, as in PEFT, and is folded in.
    """

    metric: ClassVar[str | None] = None
    recipe: ClassVar[str] = "adalora"
    scaling_in_training: ClassVar[str] = (
        "AdaLoRA keeps the factor of its start rank while ranks fall. P and Q start at random and "
        "E at zero, so its first update has another size than plain LoRA's: give it learning rates "
        "of its own. The final adapter has the policy's factor; the rest is folded into A."
    )
    refused_variants: ClassVar[Mapping[str, str]] = {
        "dora": "PEFT's AdaLoRA has no magnitudes",
        "lora_plus": "LoRA+ is for a B that starts at zero, AdaLoRA trains P, E and Q",
    }
    rank: int = option(16, "its budget is that of uniform at this rank", limits=RANK)
    start_rank: int | None = option(
        None, "rank of every site at the start; none: 1.5 times the uniform rank", limits=RANK
    )
    warmup_share: float = option(0.1, "share of the steps before the first cut", limits=_SHARE)
    final_share: float = option(0.4, "share of the steps after the last cut", limits=_SHARE)
    interval: int | None = option(None, _INTERVAL.format("hundredth"), unit="steps", limits=Limits(low=1))
    orthogonality: float = option(0.5, "weight of the penalty that keeps P and Q orthogonal", limits=Limits(low=0))

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        return _label(self, "rank", start_rank="from", warmup_share="warm", final_share="final",
                      interval="every", orthogonality="orth")  # fmt: skip

    def phases(self, steps: int) -> Phases:
        """Return when ranks change in a training of so many steps."""
        return Phases.of(
            steps,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
            interval=self.interval or max(1, steps // 100),
        )

    def start_plan(self, plan: RankPlan) -> RankPlan:
        """Return the plan of the start: one rank at every site, above the budget.

        Raises:
            AllocationError: it is not above the budget, or does not fit every site.
        """
        start = equal_rank(plan, start_rank(plan, self.start_rank, _START_FACTOR))
        ranks = {entry.rank for entry in start.entries}
        if len(ranks) > 1:
            raise AllocationError(
                f"adalora starts at one rank everywhere, but rank {max(ranks)} does not fit every "
                f"site (the smallest takes {min(ranks)}); lower rank or start_rank."
            )
        return start

    check = start_plan

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks, which set the budget; training decides the rest."""
        return RankRequest(ranks=(1.0,) * len(sites), budget=uniform_cost(sites, self.rank))


@dataclass(frozen=True, kw_only=True)
class GrowPrune:
    """Grow and prune within a fixed budget: this project's own, after ElaLoRA and L1RA.

    Plain LoRA from equal ranks. Every `interval` steps the components with the least smoothed
    sensitivity |w·g| (AdaLoRA, 2303.10512, section 3.2, without the uncertainty) give way to new
    ones at the sites whose weakest component matters most. Departures: ElaLoRA (2504.00254) and
    L1RA (2509.04884) keep the number of ranks, this keeps the parameters, at every step; L1RA
    starts the optimiser anew, here surviving components keep their moments; new components start
    with B = 0 and the next rows of the site's own stream in A, so the function does not jump.
    """

    metric: ClassVar[str | None] = None
    recipe: ClassVar[str] = "grow_prune"
    scaling_in_training: ClassVar[str] = (
        "Where a rank is added or dropped, B is rescaled so that the function stays as it is; the "
        "factor, and so the size of the next steps, is the policy's at the new rank."
    )
    rank: int = option(16, "its budget is that of uniform at this rank", limits=RANK)
    warmup_share: float = option(0.1, "share of the steps before the first move", limits=_SHARE)
    final_share: float = option(0.4, "share of the steps after the last move", limits=_SHARE)
    interval: int | None = option(None, _INTERVAL.format("twentieth"), unit="steps", limits=Limits(low=1))
    move_share: float = option(0.1, "most new ranks at one decision, as a share of all", limits=Limits(above=0, high=1))

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        return _label(self, "rank", warmup_share="warm", final_share="final", interval="every",
                      move_share="move")  # fmt: skip

    def phases(self, steps: int) -> Phases:
        """Return when ranks change in a training of so many steps."""
        return Phases.of(
            steps,
            warmup_share=self.warmup_share,
            final_share=self.final_share,
            interval=self.interval or max(1, steps // 20),
        )

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks: the start and the budget."""
        return RankRequest(ranks=(1.0,) * len(sites), budget=uniform_cost(sites, self.rank))


def _label(options: object, rank: str, **short: str) -> str:
    """Return `r8` and, for each option that differs from its default, its short name and value."""
    parts = [f"r{getattr(options, rank)}"]
    default = type(options)()
    for name, word in short.items():
        value = getattr(options, name)
        if value != getattr(default, name):
            parts.append(f"{word}{value:g}" if isinstance(value, int | float) else str(value))
    return "-".join(parts)
