"""Which engine runs the trials of a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.models.device import Runtime
from adaptive_lora.study.executors.joint import RunTrial, run_together
from adaptive_lora.study.executors.serial import run_serially
from adaptive_lora.training.trainer import Runner, Trainer

MOST_TOGETHER = 16
"""Trials in one process at once; where memory is short, fewer go through the base at a time."""


def resolve_engine(engine: str, runtime: Runtime) -> str:
    """Return serial or together for `auto`.

    Trials together fill a GPU that one trial's small batch leaves idle; on a CPU matrix products
    of one trial fill the cores already.
    """
    if engine != "auto":
        return engine
    return "together" if runtime.device.type == "cuda" else "serial"


def run_trials(
    trials: Sequence[TrialSpec],
    run: Callable[[TrialSpec, Runner], bool],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
    wait: Callable[[int], None],
    *,
    engine: str,
) -> None:
    """Run the trials of a study; an unstable one is reported and the study goes on.

    Args:
        trials: in order.
        run: runs one trial, or finds it done; False where another process is at it. It is asked
            for again after the others, until it is done or that process has died.
        on_failure: told of trials that failed.
        wait: called with the number of trials that others are at, before they are asked for again.
        engine: serial or together.
    """
    left = list(trials)
    while left:
        taken: list[TrialSpec] = []

        def attempt(trial: TrialSpec, runner: Runner, taken: list[TrialSpec] = taken) -> None:
            if not run(trial, runner):
                taken.append(trial)

        _once(left, attempt, on_failure, engine)
        left = taken
        if left:
            wait(len(left))


def _once(
    trials: Sequence[TrialSpec], run: RunTrial, on_failure: Callable[[TrialSpec, TrialFailed], None], engine: str
) -> None:
    if engine == "serial":
        run_serially(trials, lambda trial: run(trial, Trainer.run), on_failure)
        return
    run_together(trials, run, on_failure, size=lambda trial: MOST_TOGETHER if _joins(trial) else 1)


def _joins(trial: TrialSpec) -> bool:
    """Return whether a trial may train on the base that others train on at the same time."""
    return trial.method.options.is_plain_lora and trial.method.base == "full"
