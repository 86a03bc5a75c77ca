"""Allocation: from a base, measurements and a budget to a plan. Numbers only, no torch."""

from typing import Any

from adaptive_lora.allocation.allocate import allocate, make_plan
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.certificate import Certificate
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import METRICS, SPECTRAL_METRICS, ProfileSummary, RankRequest
from adaptive_lora.allocation.scaling import Scaling
from adaptive_lora.allocation.spec import MethodSpec, method_options
from adaptive_lora.allocation.tuner_plan import Plan, TunerPlan, read_plan

__all__ = [
    "METHODS",
    "METRICS",
    "SPECTRAL_METRICS",
    "AllocationProblem",
    "Certificate",
    "MethodSpec",
    "Plan",
    "ProfileSummary",
    "RankPlan",
    "RankRequest",
    "Scaling",
    "SiteRank",
    "Solution",
    "TunerPlan",
    "allocate",
    "make_plan",
    "method_options",
    "read_plan",
    "uniform_cost",
]

_RENAMED = {"RankDemand": RankRequest, "Evidence": ProfileSummary, "Problem": AllocationProblem}
"""Names that plug-ins for version 0.2 and earlier import."""


def __getattr__(name: str) -> Any:
    """Return what an earlier version called otherwise."""
    if name in _RENAMED:
        return _RENAMED[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")
