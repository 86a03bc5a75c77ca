"""Allocation: from sites, measurements and a budget to a rank plan. Numbers only, no torch."""

from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.demand import METRICS, Allocator, Evidence, RankDemand
from adaptive_lora.allocation.methods import MethodSpec, allocate
from adaptive_lora.allocation.plan import RankPlan, SiteRank, uniform_cost
from adaptive_lora.allocation.scaling import ScalePolicy

__all__ = [
    "METHODS",
    "METRICS",
    "Allocator",
    "Evidence",
    "MethodSpec",
    "RankDemand",
    "RankPlan",
    "ScalePolicy",
    "SiteRank",
    "allocate",
    "uniform_cost",
]
