"""From a method and a base to its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.budget import RankLimits
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, RankSolver, Solution
from adaptive_lora.allocation.request import ProfileSummary
from adaptive_lora.allocation.scaling import DEFAULT_ALPHA, Scaling
from adaptive_lora.allocation.site import ATTENTION_ROLES, FEED_FORWARD_ROLES, AdapterSite, select_sites
from adaptive_lora.allocation.spec import MethodSpec
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
    """
    method = spec.options
    if not method.gives_ranks:
        tuner: TunerPlan = method.plan(base, resolve_budget(spec.budget, base.sites), spec.label)
        return tuner
    return allocate(spec, base.sites, alpha=alpha, scaling=scaling, profile=profile, seed=seed)


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
        sites: all sites of the model; the method's placement selects among them.
        alpha: LoRA's alpha, for methods without one of their own.
        scaling: how alpha and rank become the factor, for methods without one of their own.
        profile: importance profile, for data-driven methods.
        seed: seed of the trial, for methods that draw at random.

    Raises:
        AllocationError: a rank above a site's smaller side, limits that contradict each other, or a
            budget that cannot be met.
    """
    everything = tuple(sites)
    chosen = select_sites(everything, spec.choice)
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
    solution: Solution = _solve_with_magnitudes(method, problem) if spec.dora else method.solve(problem)
    policy, common = Scaling(spec.scaling or scaling), alpha if spec.alpha is None else spec.alpha
    rates = solution.lr_multipliers or (1.0,) * len(ordered)
    made = {
        site.name: SiteRank(
            site=site, rank=rank, alpha=policy.alpha_at(common, rank), lr_multiplier=rate, dora=spec.dora
        )
        for site, rank, rate in zip(ordered, solution.ranks, rates, strict=True)
        if rank > 0
    }
    if not made:
        raise AllocationError(f"{spec.label} gives no site a rank; raise min_rank or the budget.")
    plan = RankPlan(
        method=spec.label,
        budget=solution.budget,
        scaling=policy,
        scaling_in_training=method.scaling_in_training,
        entries=tuple(made[site.name] for site in chosen if site.name in made),
        left_out=tuple(site.name for site in chosen if site.name not in made),
        certificate=solution.certificate,
        lora_plus=spec.lora_plus,
        base=spec.base,
    )
    method.check(plan)  # what training will start from must fit too
    return plan


def resolve_budget(budget: str | None, sites: Sequence[AdapterSite]) -> int | None:
    """Return a method's budget as a number of trainable parameters on all sites of a model."""
    if budget is None:
        return None
    if budget.startswith("uniform-"):
        return uniform_cost(sites, int(budget.removeprefix("uniform-")))
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
