"""The command line. Nothing heavy is imported before a command runs."""

from adaptive_lora.cli import machine, plan, planted, study, trial
from adaptive_lora.cli.group import main

__all__ = ["machine", "main", "plan", "planted", "study", "trial"]
