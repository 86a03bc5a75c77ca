"""From a method of any family and a base to its plan."""

from __future__ import annotations

from adaptive_lora.allocation.allocate import allocate, resolve_budget
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.family_plan import Family, Plan
from adaptive_lora.allocation.methods import MethodSpec
from adaptive_lora.allocation.request import ProfileSummary
from adaptive_lora.allocation.scaling import DEFAULT_ALPHA, Scaling


def make_plan(
    spec: MethodSpec,
    base: Architecture,
    *,
    alpha: float = DEFAULT_ALPHA,
    scaling: str = Scaling.STANDARD,
    profile: ProfileSummary | None = None,
    seed: int = 0,
) -> Plan:
    """Return what a method trains on a base: ranks, or the tensors of another family.

    Args:
        spec: the method.
        base: its sites, tensors and sizes.
        alpha: LoRA's alpha, for methods without one of their own; other families have none.
        scaling: how alpha and rank become the factor of the update.
        profile: importance profile, for data-driven methods.
        seed: of the trial, for methods that draw.

    Raises:
        AllocationError: the base does not have what is trained, or a budget cannot be met.
    """
    method = spec.allocator
    if isinstance(method, Family):
        return method.design(base, resolve_budget(spec.budget, base.sites), spec.label)
    return allocate(spec, base.sites, alpha=alpha, scaling=scaling, profile=profile, seed=seed)
