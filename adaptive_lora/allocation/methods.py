"""A method specification, `NAME[:option=value,...]`, and its way to a rank plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation.budget import fit_to_budget
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.demand import Allocator, Evidence, RankDemand
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.scaling import ScalePolicy
from adaptive_lora.errors import AllocationError, ConfigError, unknown_name
from adaptive_lora.options import Limits, option, out_of_limits, parse_value, type_hints
from adaptive_lora.sites import AdapterSite, Placement, select_sites


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """How parameters are spent: an allocator, where it may place adapters, and a budget."""

    allocator: Allocator
    placement: str = option(
        "all", "part of the block that takes adapters", limits=Limits(choices=tuple(Placement))
    )
    target_names: tuple[str, ...] = option(
        (), "only sites whose module name ends so (choice by name, as in Selective LoRA)"
    )
    budget: str | None = option(
        None, "most trainable parameters: a number, or uniform-R for those of uniform rank R"
    )

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read `NAME[:option=value,...]`, such as `linear_decay:rank=16,low_rank=4,budget=300000`.

        Several target names are joined by `+`.

        Raises:
            ConfigError: unknown method or option, or a value out of limits; all problems at once.
        """
        name, _, rest = text.strip().partition(":")
        options: dict[str, object] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(
                    f"method '{text}': required option=value after ':', got '{part}'."
                )
            options[key.strip().replace("-", "_")] = (
                value.replace("+", " ") if key.strip() == "target_names" else value.strip()
            )
        return cls.build(name.strip(), options)

    @classmethod
    def build(cls, name: str, options: Mapping[str, object]) -> MethodSpec:
        """Make a specification from a method's name and its options."""
        if name not in METHODS:
            raise ConfigError(unknown_name("method", name, METHODS))
        kind, problems = METHODS[name], []
        own = {field.name: field for field in dataclasses.fields(kind)}
        shared = {f.name: f for f in dataclasses.fields(cls) if f.name != "allocator"}
        parsed: dict[str, Any] = {}
        for key, value in options.items():
            field = own.get(key) or shared.get(key)
            if field is None:
                problems.append(unknown_name(f"option of {name}", key, [*own, *shared]))
                continue
            try:
                parsed[key] = parse_value(_hints(kind if key in own else cls)[key], value)
            except ValueError as error:
                problems.append(f"{name}: {key}: {error}")
                continue
            problems += filter(
                None, [out_of_limits(f"{name}: {key}", parsed[key], field.metadata["limits"])]
            )
        problems += filter(None, [_budget_problem(parsed.get("budget"))])
        if problems:
            raise ConfigError("; ".join(problems))
        allocator = kind(**{key: value for key, value in parsed.items() if key in own})
        return cls(
            allocator=allocator, **{key: value for key, value in parsed.items() if key in shared}
        )

    @property
    def name(self) -> str:
        """Name of the method in `METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.allocator) is kind)

    @property
    def recipe(self) -> str:
        """Key of `recipes.RECIPES`: how its plan is trained; plain LoRA where it names none."""
        return str(getattr(self.allocator, "recipe", "lora"))

    @property
    def label(self) -> str:
        """Short unique form for tables and run names, such as `linear_decay-r16-4`."""
        parts = [f"{self.name}-{self.allocator.rank_label}"]
        if self.placement != Placement.ALL:
            parts.append(self.placement)
        parts += self.target_names
        if self.budget is not None:
            parts.append(f"@{self.budget}")
        return "-".join(parts).replace("-@", "@")

    def to_dict(self) -> dict[str, Any]:
        """Return every resolved option; equal dictionaries mean equal methods."""
        own = {f.name: getattr(self.allocator, f.name) for f in dataclasses.fields(self.allocator)}  # type: ignore[arg-type]
        return {
            "name": self.name,
            **own,
            "placement": self.placement,
            "target_names": list(self.target_names),
            "budget": self.budget,
        }


def _hints(owner: Any) -> Mapping[str, Any]:
    return type_hints(owner)


def _budget_problem(budget: str | None) -> str | None:
    if budget is None:
        return None
    number = budget.removeprefix("uniform-")
    if number.isdigit() and int(number) > 0:
        return None
    return f"budget must be a whole number of parameters or uniform-R; got '{budget}'"


def allocate(
    spec: MethodSpec,
    sites: Iterable[AdapterSite],
    *,
    scale: float,
    evidence: Evidence | None = None,
    scale_policy: str = ScalePolicy.CONSTANT_ALPHA_OVER_R,
    seed: int = 0,
) -> RankPlan:
    """Turn a method into the rank of every site.

    Args:
        spec: the method.
        sites: all sites of the model; the method's placement selects among them.
        scale: factor of the update, at rank 16 or (by the default policy) at every rank.
        evidence: importance profile, for data-driven methods.
        scale_policy: how alpha follows rank.
        seed: of the trial, for methods that draw.

    Raises:
        AllocationError: a rank of 0 or above a site's smaller side, or a budget that cannot be met.
    """
    everything = tuple(sites)
    chosen = select_sites(everything, Placement(spec.placement), spec.target_names)
    demand = spec.allocator.demand(chosen, evidence)
    budget = _resolve_budget(spec.budget, everything) or demand.budget
    if budget is None:
        ranks = [math.floor(rank) for rank in demand.ranks]
        _check_ranks(spec, chosen, ranks)
    else:
        costs = [site.parameters_per_rank for site in chosen]
        lower, upper = _bounds(demand, chosen, budget / sum(costs))
        ranks = fit_to_budget(demand.ranks, costs, lower, upper, budget)
    policy = ScalePolicy(scale_policy)
    return RankPlan(
        method=spec.label,
        budget=budget,
        scale_policy=policy,
        entries=tuple(
            SiteRank(site=site, rank=rank, alpha=policy.alpha(scale, rank))
            for site, rank in zip(chosen, ranks, strict=True)
        ),
    )


def _bounds(
    demand: RankDemand, sites: tuple[AdapterSite, ...], uniform_rank: float
) -> tuple[list[int], list[int]]:
    """Return the least and greatest rank of each site under a budget."""
    least, most = demand.bounds or (0.0, math.inf)
    low, high = max(1, math.floor(least * uniform_rank)), most * uniform_rank
    return (
        [min(low, site.max_rank) for site in sites],
        [
            min(max(low, math.ceil(high)), site.max_rank) if high < site.max_rank else site.max_rank
            for site in sites
        ],
    )


def _resolve_budget(budget: str | None, sites: tuple[AdapterSite, ...]) -> int | None:
    if budget is None:
        return None
    if budget.startswith("uniform-"):
        return uniform_cost(sites, int(budget.removeprefix("uniform-")))
    return int(budget)


def _check_ranks(spec: MethodSpec, sites: tuple[AdapterSite, ...], ranks: list[int]) -> None:
    for site, rank in zip(sites, ranks, strict=True):
        if not 1 <= rank <= site.max_rank:
            raise AllocationError(
                f"{spec.label} gives {site.name} rank {rank}; required 1 to {site.max_rank} "
                f"(the smaller side of {site.in_features} x {site.out_features}); lower the rank."
            )
