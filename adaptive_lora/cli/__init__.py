"""The command line. Nothing heavy is imported before a command runs."""

from adaptive_lora.cli import compare, machine, plan, planted, schema, study, trial
from adaptive_lora.cli.group import main

__all__ = ["compare", "machine", "main", "plan", "planted", "schema", "study", "trial"]
