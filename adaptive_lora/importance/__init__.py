"""Importance: how much each site matters for the data, measured before ranks are chosen."""

from adaptive_lora.importance.contract import ProfileTask, TrainedProbe
from adaptive_lora.importance.measure import PROFILERS, profile_importance
from adaptive_lora.importance.profile import ImportanceProfile

__all__ = ["PROFILERS", "ImportanceProfile", "ProfileTask", "TrainedProbe", "profile_importance"]
