"""Methods that choose both ranks and initial weights; either can be switched off.

A study can so separate the two: `eva` beside `eva:init=default` (its ranks alone) and
`eva:ranks=uniform` (its initial weights alone); the same for `gora`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.measured import per_parameter
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits, option

_RANKS = Limits(choices=("own", "uniform"))
_INIT = Limits(choices=("own", "default"))


def _check_parts(name: str, ranks: str, init: str) -> None:
    if (ranks, init) == ("uniform", "default"):
        raise ConfigError(f"{name}:ranks=uniform,init=default is plain uniform; name that instead.")


def _label(rank: int, ranks: str, init: str) -> str:
    own = f"r{rank}" + ("" if ranks == "own" else "-uniform_ranks")
    return own + ("" if init == "own" else "-default_init")


@dataclass(frozen=True, kw_only=True)
class Eva:
    """EVA (Paischer et al. 2024, 2410.07170): directions of the inputs that explain most variance.

    A starts as the leading right singular vectors of the site's inputs, B at zero; ranks come from
    sorting all components by their share of explained variance, at most rho times `rank` a site.
    Computed by PEFT. Without a budget it spends ranks, as in the paper, `rank` a site on average:
    its parameters are whatever that costs. With a budget of parameters components are taken in the
    same order as far as it goes. Sites of one input have equal scores. The paper's
    scaling is `constant`: PEFT's `adjust_scaling_factors` keeps alpha / rank the same everywhere.
    """

    metric: ClassVar[str | None] = None
    recipe: ClassVar[str] = "eva"
    scaling_in_training: ClassVar[str] = (
        "The factor is the policy's at each rank; PEFT's own EVA keeps alpha / rank the same "
        "everywhere (scaling=constant). Where A starts from the inputs, its rows have norm 1 "
        "instead of about 0.58, so that the first update is larger at an equal learning rate."
    )
    holds_limits: ClassVar[bool] = True
    rank: int = option(16, "mean rank; EVA's budget is ranks unless one is given", limits=RANK)
    rho: float = option(2.0, "greatest rank as a multiple of rank", limits=Limits(low=1))
    tau: float = option(0.99, "cosine similarity at which a direction counts as found", limits=Limits(low=0, high=1))
    ranks: str = option("own", "'own': by explained variance; 'uniform': equal", limits=_RANKS)
    init: str = option("own", "'own': A from the inputs; 'default': as all methods", limits=_INIT)

    def __post_init__(self) -> None:
        """Refuse what is another method."""
        _check_parts("eva", self.ranks, self.init)

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        rho = "" if self.rho == 2.0 else f"-rho{self.rho:g}"
        tau = "" if self.tau == 0.99 else f"-tau{self.tau:g}"
        return _label(self.rank, self.ranks, self.init) + rho + tau

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks; EVA's own are measured on the base before training."""
        return RankRequest(ranks=(float(self.rank),) * len(sites))


@dataclass(frozen=True, kw_only=True)
class Gora:
    """GoRA (He et al. 2025, 2502.12171): ranks by mean |w·g|, B from the compressed gradient.

    Rank of a site: round(share of importance x sum of sqrt(m + n)·rank / sqrt(m + n)), clipped to
    half and four times `rank` (section 3.2); without a budget its parameters are whatever that
    costs. With one the same shares fill it within these limits. B starts so that the first product
    is the gradient's projection on A, with the norm of one step of SGD at rate gamma
    (section 3.3). The paper's scaling is `rslora`. Departure: the
    gradient is that of the calibration batches, weighted by token.
    """

    ranks_in_training: ClassVar[bool] = False
    scaling_in_training: ClassVar[str] = (
        "The factor is the policy's at each rank (the paper's is scaling=rslora). B starts from "
        "the gradient divided by the factor, so that the first function does not depend on it."
    )
    rank: int = option(16, "reference rank, about the mean", limits=RANK)
    gamma: float = option(0.05, "rate of the SGD step that B starts with", limits=Limits(above=0))
    ranks: str = option("own", "'own': by mean |w·g|; 'uniform': equal", limits=_RANKS)
    init: str = option("own", "'own': B from the gradient; 'default': zero", limits=_INIT)

    def __post_init__(self) -> None:
        """Refuse what is another method."""
        _check_parts("gora", self.ranks, self.init)

    @property
    def metric(self) -> str | None:
        """Importance profile of its ranks."""
        return "weight_gradient" if self.ranks == "own" else None

    @property
    def recipe(self) -> str:
        """Plain LoRA where only its ranks are wanted."""
        return "gora" if self.init == "own" else "lora"

    @property
    def rank_label(self) -> str:
        """Return `r8`, with every option that is not the default."""
        gamma = "" if self.gamma == 0.05 else f"-gamma{self.gamma:g}"
        return _label(self.rank, self.ranks, self.init) + gamma

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the paper's ranks, or the same shares under a budget."""
        if self.ranks == "uniform":
            weights = [1.0] * len(problem.sites)
        else:
            weights = [
                value * math.sqrt(site.parameters_per_rank)
                for value, site in zip(
                    per_parameter("gora", problem.sites, problem.profile), problem.sites, strict=True
                )
            ]  # importance / sqrt(m + n)
        if problem.budget is not None:
            ranks = problem.fit(weights, problem.budget, (0.5, 4.0))
            return Solution(ranks=ranks, budget=problem.budget)
        if self.ranks == "uniform":
            return Solution(ranks=problem.rounded([self.rank] * len(weights)), budget=None)
        roots = [math.sqrt(site.parameters_per_rank) for site in problem.sites]
        importance = sum(weight * root for weight, root in zip(weights, roots, strict=True))
        wanted = [math.floor(sum(roots) * self.rank * weight / importance + 0.5) for weight in weights]
        low, high = max(1, self.rank // 2), 4 * self.rank
        clipped = [min(max(rank, low), high, site.max_rank) for rank, site in zip(wanted, problem.sites, strict=True)]
        return Solution(ranks=problem.rounded(clipped), budget=None)
