"""Control arms: methods that wrap another one and remove one of its effects.

The wrapped method is `of`, and its options are given with the control's: `random:of=waterfill,rank=8`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.methods.measured import Empirical
from adaptive_lora.options import option
from adaptive_lora.seeding import stream_key

_DEFAULT = Empirical()


@dataclass(frozen=True, kw_only=True)
class Control(RankMethod):
    """A control arm, with the method that it wraps."""

    is_control: ClassVar[bool] = True
    wraps: ClassVar[bool] = True
    of: RankMethod = option(_DEFAULT, "method to control for")  # noqa: RUF009

    @property
    def wrapped(self) -> RankMethod:
        """Method to control for."""
        return self.of

    @property
    def metric(self) -> str | None:
        """Importance profile that the wrapped method needs."""
        return self.of.metric

    @property
    def rank_label(self) -> str:
        """Short form of the wrapped method's options."""
        return self.of.rank_label

    def solved(self, problem: AllocationProblem) -> tuple[Solution, int]:
        """Return the wrapped method's solution, and its budget: its cost, if it has none."""
        solution = self.of.solve(problem)
        return solution, problem.cost_of(solution.ranks) if solution.budget is None else solution.budget


@dataclass(frozen=True, kw_only=True)
class Random(Control):
    """The wrapped method's ranks at other sites: a permutation drawn by the trial's seed.

    Ranks are exchanged only among sites of equal cost and limits, so that the number of parameters
    is exactly equal. The permutation depends on seed and site names alone.
    """

    name: ClassVar[str] = "random"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the wrapped method's ranks, permuted."""
        solution = self.of.solve(problem)
        groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        limits = zip(problem.costs, problem.lower, problem.upper, strict=True)
        for index, group in enumerate(limits):
            groups[group].append(index)
        ranks = list(solution.ranks)
        for members in groups.values():
            drawn = sorted(members, key=lambda at: stream_key(problem.seed, "random ranks", problem.sites[at].name))
            for index, source in zip(members, drawn, strict=True):
                ranks[index] = solution.ranks[source]
        return Solution(ranks=tuple(ranks), budget=solution.budget)


@dataclass(frozen=True, kw_only=True)
class Inverse(Control):
    """The reversed order: the site with the wrapped method's largest rank requests its smallest.

    Sites of equal rank get the mean of the ranks at their mirrored positions. The mirrored ranks are
    proportions under the wrapped method's budget (its cost, if it has none).
    """

    name: ClassVar[str] = "inverse"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the wrapped method's ranks, mirrored and fitted to the budget."""
        solution, budget = self.solved(problem)
        return Solution(ranks=problem.fit(_mirrored(solution.ranks), budget), budget=budget)


def _mirrored(ranks: Sequence[int]) -> list[float]:
    """Give the k-th smallest the k-th largest rank; equal ranks get the mean over their positions."""
    order = sorted(ranks)
    places: dict[int, list[int]] = defaultdict(list)
    for rank, mirror in zip(order, reversed(order), strict=True):
        places[rank].append(mirror)
    return [sum(places[rank]) / len(places[rank]) for rank in ranks]


@dataclass(frozen=True, kw_only=True)
class LrOnly(Control):
    """Uniform ranks with the wrapped method's learning rates: rate times r_l / r at each site.

    Where the factor of the update grows with rank, a larger rank acts as a larger learning rate; this
    control has the rates without the ranks.
    """

    name: ClassVar[str] = "lr_only"

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return uniform ranks of the same budget, with a learning rate per site.

        Raises:
            AllocationError: the wrapped method leaves a site out, whose learning rate would be 0.
        """
        solution, budget = self.solved(problem)
        uniform = problem.uniform(budget)
        if not all(solution.ranks) or not all(uniform):
            raise AllocationError(
                "lr_only needs a rank of 1 or more at every site, because a learning rate of 0 "
                "trains nothing; required min_rank >= 1, got min_rank=0."
            )
        factors = tuple(of / own for of, own in zip(solution.ranks, uniform, strict=True))
        return Solution(ranks=uniform, budget=budget, lr_multipliers=factors)
