"""Executors: where the trials of a study run, one after another or several together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.models.device import Runtime
from adaptive_lora.training.joint.group import JointGroup

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
    run: Callable[[TrialSpec], bool],
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

        def attempt(trial: TrialSpec, taken: list[TrialSpec] = taken) -> None:
            if not run(trial):
                taken.append(trial)

        if engine == "serial":
            run_serially(left, attempt, on_failure)
        else:
            run_together(left, attempt, on_failure, size=lambda trial: MOST_TOGETHER if _joins(trial) else 1)
        left = taken
        if left:
            wait(len(left))


def _joins(trial: TrialSpec) -> bool:
    """Return whether a trial may train on the base that others train on at the same time."""
    return trial.method.options.is_plain_lora and trial.method.base == BaseStorage.FULL


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


def run_together(
    trials: Iterable[TrialSpec],
    run: Callable[[TrialSpec], object],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
    *,
    size: Callable[[TrialSpec], int],
) -> None:
    """Run trials in groups; an unstable one is reported and the others go on.

    Trials that cannot be trained together run one after another among the others, and their reason
    is logged once.

    Args:
        trials: in order.
        run: runs one trial.
        on_failure: told of trials that failed.
        size: with how many others like it, itself included, a trial may train; 1: alone.
    """
    for group in _groups(trials, size):
        if len(group) == 1:
            run_serially(group, run, on_failure)
        else:
            _run_group(group, run, on_failure)


def _run_group(
    trials: Sequence[TrialSpec],
    run: Callable[[TrialSpec], object],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
) -> None:
    named = {trial.label: trial for trial in trials}
    works = {label: partial(run, trial) for label, trial in named.items()}
    JointGroup(works, lambda label, failure: on_failure(named[label], failure)).run()


def _groups(trials: Iterable[TrialSpec], size: Callable[[TrialSpec], int]) -> Iterable[Sequence[TrialSpec]]:
    """Yield trials in groups, in order; what must run alone does so at once."""
    group: list[TrialSpec] = []
    room = 0
    for trial in trials:
        most = size(trial)
        if most <= 1:
            yield [trial]
            continue
        room = min(room, most) if group else most
        if len(group) >= room:
            yield group
            group, room = [], most
        group.append(trial)
    if group:
        yield group
