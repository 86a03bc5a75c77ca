"""Trials in this process: one after another, or in groups trained together on one base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from adaptive_lora.errors import TrialFailed
from adaptive_lora.interruption import TrainingPaused
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.schedule import Leg, grouped
from adaptive_lora.runner.trial import TrialOutcome, run_tracked
from adaptive_lora.tracking import StudyRun
from adaptive_lora.training.joint.group import JointGroup

Outcome = TrialOutcome | TrialFailed | TrainingPaused


def run_here(
    context: StudyContext, study: StudyRun, rounds: Iterable[Sequence[Leg]], size: int, progress: StudyProgress
) -> Iterator[tuple[Leg, Outcome]]:
    """Run the legs of all rounds in order and yield each with its outcome.

    Args:
        context: context of the study.
        study: parent run of the study.
        rounds: legs that can be run now; the next are asked for when all have ended.
        size: maximum number of trials trained together.
        progress: progress display.
    """
    for legs in rounds:
        for group in grouped(legs, size):
            yield from zip(group, run_group(context, study, group, progress), strict=True)


def run_group(context: StudyContext, study: StudyRun, legs: Sequence[Leg], progress: Any) -> list[Outcome]:
    """Run one leg, or several together, and return their outcomes."""
    runs = [
        partial(run_tracked, context, study, leg.trial, progress, pause_at=leg.pause_at, earlier=leg.earlier)
        for leg in legs
    ]
    return JointGroup(runs).run() if len(runs) > 1 else [runs[0]()]
