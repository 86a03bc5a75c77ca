"""Engines: where the trials of a study run."""

from adaptive_lora.study.executors.choice import resolve_engine, run_trials
from adaptive_lora.study.executors.joint import run_together
from adaptive_lora.study.executors.serial import run_serially

__all__ = ["resolve_engine", "run_serially", "run_together", "run_trials"]
