"""Importance: how much each site matters for the data, measured before any adapter is trained."""

from adaptive_lora.importance.gradient import PROFILERS, profile_importance
from adaptive_lora.importance.profile import ImportanceProfile

__all__ = ["PROFILERS", "ImportanceProfile", "profile_importance"]
