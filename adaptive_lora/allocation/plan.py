"""The rank plan: which site gets which rank and alpha, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.errors import AllocationError
from adaptive_lora.sites import AdapterSite, Role


def uniform_cost(sites: Iterable[AdapterSite], rank: int) -> int:
    """Return the trainable parameters of one rank everywhere: rank x sum of (in + out)."""
    return rank * sum(site.parameters_per_rank for site in sites)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRank:
    """One site with what it was given."""

    site: AdapterSite
    rank: int
    alpha: float
    """LoRA's alpha; the update is scaled by alpha / rank (Hu et al. 2021, section 4.1)."""

    @property
    def parameters(self) -> int:
        """Trainable parameters: rank x (in + out)."""
        return self.rank * self.site.parameters_per_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """What is to be built; the audit after attaching compares the model with it."""

    method: str
    """Label of the method that made it, such as `linear_decay-r16`."""
    entries: tuple[SiteRank, ...]
    budget: int | None
    """Upper limit on trainable parameters that was asked for, or None."""

    @property
    def trainable_parameters(self) -> int:
        """Parameters of all A and B matrices together."""
        return sum(entry.parameters for entry in self.entries)

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
            "sites": [
                {
                    "name": entry.site.name,
                    "layer": entry.site.layer,
                    "role": str(entry.site.role),
                    "in_features": entry.site.in_features,
                    "out_features": entry.site.out_features,
                    "rank": entry.rank,
                    "alpha": entry.alpha,
                    "parameters": entry.parameters,
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
            plan = cls(
                method=str(values["method"]),
                budget=None if values["budget"] is None else int(values["budget"]),
                entries=tuple(_entry(row) for row in values["sites"]),
            )
            stated = int(values["trainable_parameters"])
        except (KeyError, TypeError, ValueError) as error:
            raise AllocationError(
                f"not a rank plan: {type(error).__name__} {error}; required the JSON that "
                "`adaptive-lora plan --json` writes."
            ) from error
        if stated != plan.trainable_parameters:
            raise AllocationError(
                f"rank plan contradicts itself: it states {stated:,} trainable parameters, its "
                f"sites add up to {plan.trainable_parameters:,}."
            )
        return plan

    def to_json(self) -> str:
        """Return the plan as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def _entry(row: Mapping[str, Any]) -> SiteRank:
    site = AdapterSite(
        name=str(row["name"]),
        layer=int(row["layer"]),
        role=Role(row["role"]),
        in_features=int(row["in_features"]),
        out_features=int(row["out_features"]),
    )
    return SiteRank(site=site, rank=int(row["rank"]), alpha=float(row["alpha"]))
