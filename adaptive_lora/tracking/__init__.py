"""Tracking: the only importer of mlflow. Runs, artifacts, adapters as models, the registry."""

from mlflow.entities import Run

from adaptive_lora.tracking.connection import Store, connect
from adaptive_lora.tracking.registry import RegisteredAdapter, log_adapter, promote, register
from adaptive_lora.tracking.runs import StudyRun, TrialRun
from adaptive_lora.tracking.trials import read_trials

__all__ = [
    "RegisteredAdapter",
    "Run",
    "Store",
    "StudyRun",
    "TrialRun",
    "connect",
    "log_adapter",
    "promote",
    "read_trials",
    "register",
]
