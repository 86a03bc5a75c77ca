"""Bad inputs as tables: each has one clear message, exit code 2, and leaves nothing behind."""

from bad_inputs import adapters, data, plans, studies, workers
from bad_inputs.case import Bad

CASES: tuple[Bad, ...] = (*studies.CASES, *data.CASES, *plans.CASES, *workers.CASES)
"""Inputs that are files and words of a command line."""
ADAPTERS = adapters.CASES
"""Changes to an adapter folder that is right."""

__all__ = ["ADAPTERS", "CASES", "Bad"]
