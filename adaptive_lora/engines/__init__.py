"""Engines: where the trials of a study run."""

from adaptive_lora.engines.serial import run_serially

__all__ = ["run_serially"]
