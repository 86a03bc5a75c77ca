"""Engines: where the trials of a study run."""

from adaptive_lora.engines.choice import resolve_engine, run_trials
from adaptive_lora.engines.serial import run_serially
from adaptive_lora.engines.together import run_together

__all__ = ["resolve_engine", "run_serially", "run_together", "run_trials"]
