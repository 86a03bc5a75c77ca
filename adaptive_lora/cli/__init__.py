"""The command line. Nothing heavy is imported before a command runs."""

from adaptive_lora.cli import export, machine, plan, planted, power, study, sync, transfer, trial
from adaptive_lora.cli.group import main

__all__ = ["export", "machine", "main", "plan", "planted", "power", "study", "sync", "transfer", "trial"]
