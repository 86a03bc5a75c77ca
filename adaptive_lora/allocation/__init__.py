"""Allocation: from a base, measurements and a budget to a plan. Numbers only, no torch."""

from adaptive_lora.allocation.allocate import allocate
from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.certificate import Certificate
from adaptive_lora.allocation.family_plan import Family, FamilyPlan, Plan, read_plan
from adaptive_lora.allocation.make import make_plan
from adaptive_lora.allocation.methods import MethodSpec, method_options
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.problem import AllocationProblem, Solution, Solver
from adaptive_lora.allocation.request import METRICS, SPECTRAL_METRICS, Allocator, ProfileSummary, RankRequest
from adaptive_lora.allocation.scaling import Scaling

__all__ = [
    "METHODS",
    "METRICS",
    "SPECTRAL_METRICS",
    "AllocationProblem",
    "Allocator",
    "Certificate",
    "Family",
    "FamilyPlan",
    "MethodSpec",
    "Plan",
    "ProfileSummary",
    "RankPlan",
    "RankRequest",
    "Scaling",
    "SiteRank",
    "Solution",
    "Solver",
    "allocate",
    "make_plan",
    "method_options",
    "read_plan",
    "uniform_cost",
]
