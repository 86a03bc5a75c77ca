"""Allocation: from sites, scores and a parameter budget to a rank plan. Numbers only, no torch."""

from adaptive_lora.allocation.allocators import METHODS, Allocator, RankDemand
from adaptive_lora.allocation.methods import MethodSpec, allocate
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost

__all__ = [
    "METHODS",
    "Allocator",
    "MethodSpec",
    "RankDemand",
    "RankPlan",
    "SiteRank",
    "allocate",
    "uniform_cost",
]
