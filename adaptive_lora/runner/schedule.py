"""Legs of trials: what can be run now, alone or in groups trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import StudyConfig, TrialSpec
from adaptive_lora.tracking import Run

MOST_TOGETHER = 16
"""Maximum number of trials trained together in one process; fewer per forward pass if memory is short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """A trial, or a part of it, that can be run now."""

    trial: TrialSpec
    pause_at: int | None = None
    """Optimiser step of the rung at which it is paused for the other rates; None: to its end."""
    earlier: Sequence[Run] = ()
    """Runs of the trial in the store, newest first."""


def is_over(runs: Iterable[Run], failed_before: frozenset[str]) -> bool:
    """Return whether a trial is complete for this process.

    Args:
        runs: its runs in the store.
        failed_before: ids of runs that had failed when the study was opened, whose trials are run again.
    """
    return any(
        run.info.status == "FINISHED" or (run.info.status == "FAILED" and run.info.run_id not in failed_before)
        for run in runs
    )


def grouped(legs: Iterable[Leg], size: int) -> Iterator[Sequence[Leg]]:
    """Yield groups of legs to be trained together, in order; those that must run alone are yielded at once.

    Args:
        legs: legs that can be run now.
        size: maximum number of legs in a group.
    """
    group: list[Leg] = []
    for leg in legs:
        if size == 1 or not _joins(leg.trial):
            yield [leg]
            continue
        group.append(leg)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _joins(trial: TrialSpec) -> bool:
    """Return whether a trial can be trained together with others on one base."""
    return trial.method.is_plain_lora and trial.method.base == BaseStorage.FULL


def group_size(config: StudyConfig) -> int:
    """Return the maximum number of trials that a process trains together; a race stops trials one by one."""
    if config.race:
        return 1
    return config.worker.group_size or (MOST_TOGETHER if config.engine == "together" else 1)
