"""The command line. Nothing heavy is imported before a command runs."""

from adaptive_lora.cli import embedded, machine, plan, study, trial
from adaptive_lora.cli.group import main

__all__ = ["embedded", "machine", "main", "plan", "study", "trial"]
