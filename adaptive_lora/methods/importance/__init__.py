"""Importance of sites for the data, measured before ranks are chosen."""

from adaptive_lora.methods.importance.contract import ProfileTask, TrainedProbe
from adaptive_lora.methods.importance.profile import (
    PROFILERS,
    ImportanceProfile,
    profile_importance,
    profile_importances,
)

__all__ = ["PROFILERS", "ImportanceProfile", "ProfileTask", "TrainedProbe", "profile_importance", "profile_importances"]
