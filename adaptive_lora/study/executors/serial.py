"""One trial after another in this process: the reference that other engines must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed


def run_serially(
    trials: Iterable[TrialSpec],
    run: Callable[[TrialSpec], object],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
) -> None:
    """Run trials in order; an unstable one is reported and the study goes on."""
    for trial in trials:
        try:
            run(trial)
        except TrialFailed as failure:
            on_failure(trial, failure)
