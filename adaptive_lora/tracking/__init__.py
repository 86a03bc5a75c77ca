"""Tracking: the only importer of mlflow. Runs, artifacts, adapters as models, the registry."""

from mlflow.entities import Run

from adaptive_lora.tracking.connection import connect
from adaptive_lora.tracking.recorder import TrialRun
from adaptive_lora.tracking.registry import RegisteredAdapter, promote, register
from adaptive_lora.tracking.runs import find_trials, open_comparison
from adaptive_lora.tracking.store import Store
from adaptive_lora.tracking.study_run import StudyRun
from adaptive_lora.tracking.trials import eval_from_dict, read_trials

__all__ = [
    "RegisteredAdapter",
    "Run",
    "Store",
    "StudyRun",
    "TrialRun",
    "connect",
    "eval_from_dict",
    "find_trials",
    "open_comparison",
    "promote",
    "read_trials",
    "register",
]
