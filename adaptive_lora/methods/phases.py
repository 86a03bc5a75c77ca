"""Methods that find ranks in training: their budget, the phases of their decisions, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.plan import uniform_cost
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import Limits, option

SHARE = Limits(low=0, high=0.9)
"""Limits of a share of the training without rank changes."""
INTERVAL = "optimiser steps between two decisions on ranks; none: a {} of the training"


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
class RanksInTraining(RankMethod):
    """A method whose plan only sets the budget, by equal ranks; training decides the final ranks."""

    ranks_in_training: ClassVar[bool] = True
    rank: int = option(16, "uniform rank whose number of parameters is the budget, where none is given", limits=RANK)

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks with the parameters of uniform rank `rank`."""
        return RankRequest(ranks=(1.0,) * len(sites), budget=uniform_cost(sites, self.rank))


def label_of(options: object, rank: str, **short: str) -> str:
    """Return `r8` and, for each option that differs from its default, its short name and value."""
    parts = [f"r{getattr(options, rank)}"]
    default = type(options)()
    for name, word in short.items():
        value = getattr(options, name)
        if value != getattr(default, name):
            parts.append(f"{word}{value:g}" if isinstance(value, int | float) else str(value))
    return "-".join(parts)
