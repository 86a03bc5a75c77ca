"""From a method and a base to its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.budget import RankLimits
from adaptive_lora.allocation.plan import BaseStorage, RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, RankSolver, Solution
from adaptive_lora.allocation.request import ProfileSummary
from adaptive_lora.allocation.scaling import DEFAULT_ALPHA, Scaling
from adaptive_lora.allocation.site import ATTENTION_ROLES, FEED_FORWARD_ROLES, AdapterSite, select_sites
from adaptive_lora.allocation.spec import MethodSpec
from adaptive_lora.allocation.start import Start
from adaptive_lora.allocation.tuner_plan import Plan, TunerPlan
from adaptive_lora.errors import AllocationError


def make_plan(
    spec: MethodSpec,
    base: Architecture,
    *,
    alpha: float = DEFAULT_ALPHA,
    scaling: str = Scaling.STANDARD,
    profile: ProfileSummary | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of a method on a base: a rank per site, or the tensors of another tuner.

    Args:
        spec: the method.
        base: sites, tensors and sizes of the base model.
        alpha: LoRA's alpha, for methods without one of their own; other tuners have none.
        scaling: how alpha and rank become the factor of the update.
        profile: importance profile, for data-driven methods.
        seed: seed of the trial, for methods that draw at random.

    Raises:
        AllocationError: the base lacks the tensors to train, or a budget cannot be met.
        ModelError: routed experts are asked for, and the base has none that take adapters.
    """
    method = spec.options
    if spec.base != BaseStorage.FULL:  # whose packed layers store all weights as (out, in)
        packed = {site.name for site in base.sites if site.packable}
        base = dataclasses.replace(base, transposed=base.transposed - packed)
    if not method.gives_ranks and method.wrapped is None:
        chosen = dataclasses.replace(base, sites=select_sites(base.sites, spec.choice))
        return _stored(method.plan(chosen, resolve_budget(spec.budget, base.sites), spec.label), spec.base)
    inner = spec if method.gives_ranks else dataclasses.replace(spec, options=method.wrapped)
    ranks = allocate(inner, base.sites_of(spec.experts), alpha=alpha, scaling=scaling, profile=profile, seed=seed)
    return ranks if method.gives_ranks else _stored(method.design_shares(base, ranks, spec.label), spec.base)


def _stored(plan: TunerPlan, base: str) -> TunerPlan:
    """Return a plan with how the frozen base's weights are stored, which earlier plans of a full base do not say."""
    return plan if base == BaseStorage.FULL else dataclasses.replace(plan, settings={**plan.settings, "base": base})


def allocate(
    spec: MethodSpec,
    sites: Iterable[AdapterSite],
    *,
    alpha: float = DEFAULT_ALPHA,
    scaling: str = Scaling.STANDARD,
    profile: ProfileSummary | None = None,
    seed: int = 0,
) -> RankPlan:
    """Turn a method into the rank of every site.

    Args:
        spec: the method.
        sites: all sites of the model; the method's placement selects among them, routed experts only with `experts`.
        alpha: LoRA's alpha, for methods without one of their own.
        scaling: how alpha and rank become the factor, for methods without one of their own.
        profile: importance profile, for data-driven methods.
        seed: seed of the trial, for methods that draw at random.

    Raises:
        AllocationError: a rank above a site's smaller side, limits that contradict each other, or a
            budget that cannot be met.
    """
    everything = tuple(sites)
    chosen = _chosen(spec, [site for site in everything if spec.experts or not site.experts])
    ordered = tuple(sorted(chosen, key=lambda site: (site.layer, site.name)))
    method = spec.options
    # Methods that change ranks in training start from equal ranks, and apply the limits at each decision.
    limits = rank_limits(MethodSpec(options=method) if method.ranks_in_training else spec, ordered)
    problem = AllocationProblem(
        sites=ordered,
        lower=limits.lower,
        upper=limits.upper,
        multiple=limits.multiple,
        budget=resolve_budget(spec.budget, everything),
        profile=profile,
        seed=seed,
    )
    found: Solution = _solve_with_magnitudes(method, problem) if spec.dora else method.solve(problem)
    policy, common = Scaling(spec.scaling or scaling), alpha if spec.alpha is None else spec.alpha
    made = {
        site.name: SiteRank(
            site=site, rank=rank, alpha=policy.alpha_at(common, rank), lr_multiplier=rate, dora=spec.dora
        )
        for site, rank, rate in zip(ordered, found.ranks, found.lr_multipliers or (1.0,) * len(ordered), strict=True)
        if rank > 0
    }
    if not made:
        raise AllocationError(f"{spec.label} gives no site a rank; raise min_rank or the budget.")
    plan = RankPlan(
        method=spec.label,
        budget=found.budget,
        scaling=policy,
        scaling_in_training=method.scaling_in_training,
        entries=tuple(made[site.name] for site in chosen if site.name in made),
        left_out=tuple(site.name for site in chosen if site.name not in made),
        certificate=found.certificate,
        lora_plus=spec.lora_plus,
        base=spec.base,
        init=Start(spec.init),
        invocation=spec.alora,
    )
    return _checked(plan, method)  # what training will start from must fit too


def _chosen(spec: MethodSpec, sites: Sequence[AdapterSite]) -> tuple[AdapterSite, ...]:
    """Return the sites that a method's options select, with the trained parameters of a rank as they are counted.

    Raises:
        AllocationError: routed experts are asked for, and none is selected.
    """
    chosen = select_sites(sites, spec.choice)
    if spec.experts and not any(site.experts for site in chosen):
        raise AllocationError(
            f"{spec.label}: experts=true, and no routed experts are among its sites; leave experts out, select some by "
            "placement, roles, layers, towers or target_names, or give a profile that measured them."
        )
    return tuple(dataclasses.replace(site, frozen_a=True) for site in chosen) if spec.lora_fa else chosen


def _checked(plan: RankPlan, method: Any) -> RankPlan:
    """Return a plan that its method can train, and whose initial weights exist at its ranks.

    Raises:
        AllocationError: an odd rank under `init=orthogonal`, or one above half a site's smaller side under `lora_ga`.
    """
    odd = [entry for entry in plan.entries if entry.rank % 2]
    if plan.init is Start.ORTHOGONAL and odd:
        raise AllocationError(
            f"{plan.method}: init=orthogonal divides the ranks of a site between A and B, so that they must be even; "
            f"got {odd[0].rank} at {odd[0].site.name}. Give an even rank or, where ranks differ, multiple=2."
        )
    wide = [entry for entry in plan.entries if 2 * entry.rank > entry.site.max_rank]
    if plan.init is Start.LORA_GA and wide:
        raise AllocationError(
            f"{plan.method}: init=lora_ga takes two singular vectors of the gradient for each rank; required at most "
            f"{wide[0].site.max_rank // 2} at {wide[0].site.name}, got {wide[0].rank}. Lower the rank or set max_rank."
        )
    method.check(plan)
    return plan


def resolve_budget(budget: str | None, sites: Sequence[AdapterSite]) -> int | None:
    """Return a method's budget as a number of trainable parameters.

    `uniform-R` is the number of plain LoRA, whose A and B are trained, on all linear layers: it is one number for
    methods with and without routed experts.
    """
    if budget is None:
        return None
    if budget.startswith("uniform-"):
        linear = (site for site in sites if not site.experts)
        return uniform_cost(linear, int(budget.removeprefix("uniform-")))
    return int(budget)


def rank_limits(spec: MethodSpec, sites: Sequence[AdapterSite], *, least: int = 1) -> RankLimits:
    """Return the limits that a method's options set.

    Args:
        spec: the method.
        sites: sites in the order of the limits returned.
        least: minimum rank where the method sets no `min_rank`.

    Raises:
        AllocationError: no rank is allowed at a site.
    """
    both = [_limits(spec, site, least) for site in sites]
    lower, upper = zip(*both, strict=True)
    return RankLimits(lower=lower, upper=upper, multiple=spec.multiple)


def _limits(spec: MethodSpec, site: AdapterSite, least: int) -> tuple[int, int]:
    caps = [site.max_rank, spec.max_rank]
    caps += [spec.attention_cap] if site.role in ATTENTION_ROLES else []
    caps += [spec.feed_forward_cap] if site.role in FEED_FORWARD_ROLES else []
    most = min(cap for cap in caps if cap is not None)
    wanted = least if spec.min_rank is None else spec.min_rank
    low = -(-wanted // spec.multiple) * spec.multiple
    high = most // spec.multiple * spec.multiple
    if low > high:
        raise AllocationError(
            f"{spec.label}: no rank is allowed at {site.name}: required a multiple of "
            f"{spec.multiple} from {wanted} to {most}; change min_rank, max_rank, the caps "
            "or multiple, or leave the site out by placement or target_names."
        )
    return low, high


def _solve_with_magnitudes(method: RankSolver, problem: AllocationProblem) -> Solution:
    """Return ranks for DoRA, whose magnitudes (one per output of an adapted site) are charged first.

    A given budget covers ranks and magnitudes. Without one, the method's own budget (that of uniform
    rank R) covers ranks alone and the magnitudes are added, as for `uniform`. A site of rank 0 needs
    no magnitudes: it is excluded, and the parameters saved go to the other sites.

    Raises:
        AllocationError: the magnitudes alone use up the budget, or a control arm leaves sites out.
    """
    total, open_sites = problem.budget, [True] * len(problem.sites)
    while True:
        magnitudes = sum(site.out_features for site, used in zip(problem.sites, open_sites, strict=True) if used)
        if total is not None and total <= magnitudes:
            raise AllocationError(
                f"budget of {total:,} parameters is too small for dora: its magnitudes alone cost "
                f"{magnitudes:,}; raise the budget or narrow the placement."
            )
        inner = dataclasses.replace(problem, budget=None if total is None else total - magnitudes)
        found = method.solve(inner)
        if found.budget is None:
            return found
        total = found.budget + magnitudes if total is None else total
        ranked = [rank > 0 for rank in found.ranks]
        if ranked == open_sites:
            return dataclasses.replace(found, budget=total)
        if method.wrapped is not None:
            raise AllocationError(
                "a control arm with dora needs a rank of 1 or more at every site: which sites are "
                "left out decides what their magnitudes cost; required min_rank >= 1, got 0."
            )
        open_sites = ranked
        upper = tuple(high if used else 0 for high, used in zip(problem.upper, ranked, strict=True))
        problem = dataclasses.replace(problem, upper=upper)
