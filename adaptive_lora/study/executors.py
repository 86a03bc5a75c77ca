"""Executors, which run the trials of a study one after another or several together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.models.device import Runtime
from adaptive_lora.training.joint.group import JointGroup

MOST_TOGETHER = 16
"""Maximum number of trials trained together in one process; fewer per forward pass if memory is short."""


def resolve_engine(engine: str, runtime: Runtime) -> str:
    """Return serial or together for `auto`.

    Trials together use a GPU fully, which one trial's small batch does not; on a CPU the matrix
    products of one trial already use all cores.
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
    """Run the trials of a study; an unstable one is reported and the study continues.

    Args:
        trials: trials, in order.
        run: function that runs one trial unless it is done; it returns False if another process
            runs it. Such a trial is tried again after the others, until it is done or that process
            has died.
        on_failure: function called with each trial that failed.
        wait: function called with the number of trials that other processes run, before they are
            tried again.
        engine: serial or together.
    """
    left = list(trials)
    while left:
        taken: list[TrialSpec] = []

        def attempt(trial: TrialSpec, taken: list[TrialSpec] = taken) -> None:
            if not run(trial):
                taken.append(trial)

        (run_serially if engine == "serial" else run_together)(left, attempt, on_failure)
        left = taken
        if left:
            wait(len(left))


def _joins(trial: TrialSpec) -> bool:
    """Return whether a trial can be trained together with others on one base."""
    return trial.method.options.is_plain_lora and trial.method.base == BaseStorage.FULL


def run_serially(
    trials: Iterable[TrialSpec],
    run: Callable[[TrialSpec], object],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
) -> None:
    """Run trials in order; an unstable one is reported and the study continues."""
    for trial in trials:
        try:
            run(trial)
        except TrialFailed as failure:
            on_failure(trial, failure)


def run_together(
    trials: Iterable[TrialSpec],
    run: Callable[[TrialSpec], object],
    on_failure: Callable[[TrialSpec, TrialFailed], None],
) -> None:
    """Run trials in groups; an unstable one is reported and the others continue.

    Trials that cannot be trained together run one after another between the groups, and the reason is
    logged once.

    Args:
        trials: trials, in order.
        run: function that runs one trial.
        on_failure: function called with each trial that failed.
    """
    for group in _groups(trials):
        if len(group) == 1:
            run_serially(group, run, on_failure)
        else:
            named = {trial.label: trial for trial in group}

            def failed(label: str, failure: TrialFailed, named: Mapping[str, TrialSpec] = named) -> None:
                on_failure(named[label], failure)

            JointGroup({label: partial(run, trial) for label, trial in named.items()}, failed).run()


def _groups(trials: Iterable[TrialSpec]) -> Iterator[Sequence[TrialSpec]]:
    """Yield trials in groups of at most `MOST_TOGETHER`, in order; trials that must run alone are yielded at once."""
    group: list[TrialSpec] = []
    for trial in trials:
        if not _joins(trial):
            yield [trial]
            continue
        if len(group) == MOST_TOGETHER:
            yield group
            group = []
        group.append(trial)
    if group:
        yield group
