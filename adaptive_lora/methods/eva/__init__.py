"""EVA: ranks and A from the variance of each site's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.allocation.request import RANK, ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.base import TrialContext
from adaptive_lora.methods.initialised import Initialised
from adaptive_lora.options import Limits, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Eva(Initialised):
    """EVA (Paischer et al. 2024, 2410.07170): initial A from the principal directions of the inputs.

    A starts as the leading right singular vectors of the site's inputs, B at zero; ranks come from
    sorting all components by their share of explained variance, at most rho times `rank` per site.
    Computed by PEFT. Without a budget it distributes ranks, as in the paper, `rank` per site on
    average, with any number of parameters. With a parameter budget, components are taken in the same
    order until it is used up. Sites with the same input have equal scores. The paper's scaling is
    `constant`: PEFT's `adjust_scaling_factors` keeps alpha / rank equal at all sites.
    """

    name: ClassVar[str] = "eva"
    ranks_in_training: ClassVar[bool] = True
    side: ClassVar[str] = "lora_A"
    scaling_in_training: ClassVar[str] = (
        "The factor is the policy's at each rank; PEFT's own EVA keeps alpha / rank the same "
        "everywhere (scaling=constant). Where A starts from the inputs, its rows have norm 1 "
        "instead of about 0.58, so that the first update is larger at an equal learning rate."
    )
    rank: int = option(16, "mean rank over sites; without a budget, EVA distributes ranks, not parameters", limits=RANK)
    rho: float = option(2.0, "maximum rank as a multiple of rank", limits=Limits(low=1), label="rho{:g}")
    tau: float = option(
        0.99,
        "cosine similarity at which a direction counts as converged",
        limits=Limits(low=0, high=1),
        label="tau{:g}",
    )

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return equal ranks; EVA's own are measured on the base before training."""
        return RankRequest(ranks=(float(self.rank),) * len(sites))

    def start_from(self, trial: TrialContext) -> tuple[RankPlan, Mapping[str, torch.Tensor]]:
        """Return EVA's ranks and directions, measured on the base."""
        from adaptive_lora.methods.eva.fit import measured

        plan, directions = measured(trial, self)
        return plan, directions.a if self.init == "own" else {}
