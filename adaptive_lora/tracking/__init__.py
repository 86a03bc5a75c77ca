"""Tracking: the only importer of mlflow. Runs, artifacts, adapters as models, the registry."""

from mlflow.entities import Run

from adaptive_lora.tracking.connection import Store, connect
from adaptive_lora.tracking.recorder import DataId, Recorder
from adaptive_lora.tracking.registry import RegisteredAdapter, promote, register
from adaptive_lora.tracking.runs import eval_from_dict, find_runs, find_trials, open_comparison, read_trials
from adaptive_lora.tracking.study_run import StudyRun

__all__ = [
    "DataId",
    "Recorder",
    "RegisteredAdapter",
    "Run",
    "Store",
    "StudyRun",
    "connect",
    "eval_from_dict",
    "find_runs",
    "find_trials",
    "open_comparison",
    "promote",
    "read_trials",
    "register",
]
