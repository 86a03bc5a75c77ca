"""The rank plan: rank and alpha of every site, the number of parameters, and the plan with revised ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adaptive_lora.allocation.certificate import Certificate
from adaptive_lora.allocation.scaling import Scaling
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.allocation.start import Start
from adaptive_lora.errors import AllocationError


def uniform_cost(sites: Iterable[AdapterSite], rank: int) -> int:
    """Return the trainable parameters of the same rank at all sites: rank x sum of (in + out), less at experts."""
    return sum(site.equal_rank(rank) * site.parameters_per_rank for site in sites)


class BaseStorage(StrEnum):
    """Storage of the frozen base's weights."""

    FULL = "full"
    """As saved, in the precision of the study."""
    NF4 = "nf4"
    """In 4 bit with double quantisation (QLoRA)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRank:
    """One site with its rank, alpha and training options."""

    site: AdapterSite
    rank: int
    alpha: float
    """PEFT's `lora_alpha`; with the plan's scaling policy it gives the factor of the update."""
    lr_multiplier: float = 1.0
    """Factor of the learning rate of this site's A and B."""
    dora: bool = False
    """Mark of a site with a trained magnitude per output (DoRA, Liu et al. 2024, 2402.09353)."""

    @property
    def magnitudes(self) -> int:
        """Number of DoRA magnitudes: one per output, at any rank."""
        return self.site.out_features if self.dora else 0

    @property
    def parameters(self) -> int:
        """Number of trainable parameters: rank x (in + out), plus the magnitudes."""
        return self.rank * self.site.parameters_per_rank + self.magnitudes


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """Adapters to be built; the audit after attaching compares the model with it."""

    method: str
    """Label of the method that made it, such as `linear_decay-r16`."""
    entries: tuple[SiteRank, ...]
    budget: int | None
    """Upper limit on trainable parameters set by the user, or None."""
    scaling: Scaling = Scaling.STANDARD
    """Policy by which alpha and rank become the factor of the update."""
    trained_rank: int | None = None
    """Rank of every site while it was trained; None: the rank of its entry."""
    scaling_in_training: str = ""
    """Sentence on how the method changes the factor in training; empty: it does not."""
    left_out: tuple[str, ...] = ()
    """Names of the placement's sites with rank 0: they get no adapter and have no entry."""
    certificate: Certificate | None = None
    """The solver's certificate for these ranks, or None where it gives none."""
    lora_plus: float = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, 2402.12354)."""
    base: str = BaseStorage.FULL
    """Storage of the frozen base's weights: `full` as saved, or `nf4` where the architecture allows it."""
    init: Start = Start.DEFAULT
    """Initial weights of A and B."""
    invocation: str | None = None
    """Text from whose last occurrence on the adapter acts (aLoRA, Greenewald et al. 2025, 2504.12397), or None."""

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters: all A and B matrices and magnitudes."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def magnitudes(self) -> int:
        """Number of trainable parameters that are DoRA magnitudes, which do not depend on ranks."""
        return sum(entry.magnitudes for entry in self.entries)

    @property
    def dora(self) -> bool:
        """Mark of a plan of DoRA layers."""
        return any(entry.dora for entry in self.entries)

    @property
    def frozen_a(self) -> bool:
        """Mark of a plan whose A are not trained (LoRA-FA, Zhang et al. 2023, 2308.03303)."""
        return any(entry.site.frozen_a for entry in self.entries)

    @property
    def built(self) -> RankPlan:
        """Plan of the LoRA layers on the base, which are also the saved adapter's.

        Where the first B₀·A₀ is taken out of the weight, W - s·B₀·A₀ + s·B·A is computed by a layer of twice the rank
        and the same factor s, with the factors (B, -B₀) and (A, A₀), of which B₀ and A₀ do not change.
        """
        if not self.init.is_subtracted:
            return dataclasses.replace(self, init=Start.DEFAULT)
        entries = tuple(
            dataclasses.replace(
                entry,
                rank=2 * entry.rank,
                alpha=entry.alpha * self.scaling.factor(1.0, entry.rank) / self.scaling.factor(1.0, 2 * entry.rank),
            )
            for entry in self.entries
        )
        return dataclasses.replace(self, entries=entries, init=Start.DEFAULT)

    def scale_of(self, entry: SiteRank) -> float:
        """Return the factor that an entry's B·A is multiplied by."""
        return self.scaling.factor(entry.alpha, entry.rank)

    def step_size_of(self, entry: SiteRank) -> float:
        """Return factor x rank as an entry was trained, which Adam's first update grows with."""
        rank = self.trained_rank or entry.rank
        return self.scaling.step_size(self.scaling.at_rank(entry.alpha, entry.rank, rank), rank)

    def base_of(self, entry: SiteRank) -> str:
        """Return how the base weight of an entry is stored."""
        return self.base if entry.site.packable else BaseStorage.FULL

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the base, the initial weights and what is counted under this plan, in sentences."""
        whole = [entry.site.name for entry in self.entries if not entry.site.packable]
        found = []
        if self.base != BaseStorage.FULL and whole:
            found.append(
                f"base={self.base}: {len(whole)} of {len(self.entries)} sites, such as {whole[0]}, "
                "keep their weights as saved, because the architecture does not take them packed."
            )
        if self.init.is_subtracted:
            most = max(entry.rank for entry in self.entries)
            found.append(
                f"init={self.init}: the adapter is saved as plain LoRA on the unchanged base, at twice the trained "
                f"rank (at most {2 * most} for {most}), because it also holds what the start took out of the weights."
            )
        if self.frozen_a:
            found.append("lora_fa: A is not trained, and parameters and budgets count B alone; both are saved.")
        if self.invocation is not None:
            found.append(
                f"alora: the adapter acts from the last {self.invocation!r} of a row on, and tokens before it see the "
                "base alone, so that their cache can be shared; it cannot be merged."
            )
        return tuple(found)

    def lr_multipliers(self) -> dict[str, float]:
        """Return site name -> factor of its learning rate, where that is not 1."""
        return {e.site.name: e.lr_multiplier for e in self.entries if e.lr_multiplier != 1.0}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites with an adapter."""
        return tuple(entry.site.name for entry in self.entries)

    def rank_pattern(self) -> dict[str, int]:
        """Return PEFT's `rank_pattern`: one full module name per site."""
        return {entry.site.name: entry.rank for entry in self.entries}

    def alpha_pattern(self) -> dict[str, float]:
        """Return PEFT's `alpha_pattern`: one full module name per site."""
        return {entry.site.name: entry.alpha for entry in self.entries}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; `from_dict` reads them back."""
        return {
            "method": self.method,
            "budget": self.budget,
            "trainable_parameters": self.trainable_parameters,
            "scaling": str(self.scaling),
            "trained_rank": self.trained_rank,
            "scaling_in_training": self.scaling_in_training,
            "dora": self.dora,
            "lora_plus": self.lora_plus,
            "base": self.base,
            **({} if self.init is Start.DEFAULT else {"init": str(self.init)}),
            **({} if self.invocation is None else {"invocation": self.invocation}),
            "left_out": list(self.left_out),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "sites": [
                {
                    "name": entry.site.name,
                    "layer": entry.site.layer,
                    "role": str(entry.site.role),
                    "tower": entry.site.tower,
                    "in_features": entry.site.in_features,
                    "out_features": entry.site.out_features,
                    "rank": entry.rank,
                    "alpha": entry.alpha,
                    "scale": self.scale_of(entry),
                    "step_size": self.step_size_of(entry),
                    "lr_multiplier": entry.lr_multiplier,
                    "parameters": entry.parameters,
                    **({} if entry.site.packable else {"packable": False}),
                    **({"frozen_a": True} if entry.site.frozen_a else {}),
                    **({"saved_rank": 2 * entry.rank} if self.init.is_subtracted else {}),
                    **({"experts": entry.site.experts, "active": entry.site.active} if entry.site.experts else {}),
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankPlan:
        """Read a plan written by `to_dict`.

        Raises:
            AllocationError: a field is missing, of the wrong type, or contradicts another.
        """
        try:
            certificate = values["certificate"]
            plan = cls(
                method=str(values["method"]),
                budget=None if values["budget"] is None else int(values["budget"]),
                entries=tuple(_entry(row, bool(values.get("dora"))) for row in values["sites"]),
                scaling=Scaling(values.get("scaling", values.get("scale_policy"))),
                trained_rank=_optional_rank(values.get("trained_rank")),
                scaling_in_training=str(values.get("scaling_in_training", "")),
                left_out=tuple(str(name) for name in values["left_out"]),
                certificate=None if certificate is None else Certificate.from_dict(certificate),
                lora_plus=float(values.get("lora_plus", 1.0)),
                base=str(values.get("base", BaseStorage.FULL)),
                init=Start(values.get("init", Start.DEFAULT)),
                invocation=values.get("invocation"),
            )
            stated = int(values["trainable_parameters"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AllocationError(
                f"not a rank plan: {type(error).__name__} {error}; required the JSON that "
                "`adaptive-lora plan --json` writes."
            ) from error
        if stated != plan.trainable_parameters:
            raise AllocationError(
                f"rank plan contradicts itself: its total is {stated:,} trainable parameters, its "
                f"sites add up to {plan.trainable_parameters:,}."
            )
        return plan

    def to_json(self) -> str:
        """Return the plan as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def _optional_rank(value: Any) -> int | None:
    if value is not None and int(value) < 1:
        raise ValueError(f"trained_rank must be at least 1; got {int(value)}")
    return None if value is None else int(value)


def _entry(row: Mapping[str, Any], dora: bool) -> SiteRank:
    return SiteRank(
        site=AdapterSite.from_dict(row),
        rank=int(row["rank"]),
        alpha=float(row["alpha"]),
        lr_multiplier=float(row["lr_multiplier"]),
        dora=dora,
    )


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
            dataclasses.replace(entry, rank=rank, alpha=plan.scaling.at_rank(entry.alpha, entry.rank, rank))
            for entry in plan.entries
            if (rank := ranks[entry.site.name]) > 0
        ),
        left_out=(*plan.left_out, *(name for name in names if not ranks[name])),
    )


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
