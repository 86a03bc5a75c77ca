"""Legs whose worker was lost: what the store has of them, for the next worker."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

from adaptive_lora.errors import TrialFailed
from adaptive_lora.interruption import TrainingPaused
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.schedule import Leg
from adaptive_lora.runner.trial_log import failure_logged, trial_tags
from adaptive_lora.tracking import StudyRun
from adaptive_lora.tracking.study_run import rung_reached


class LostLegs:
    """The store's side of a study whose workers may be lost."""

    def __init__(self, context: StudyContext, study: StudyRun) -> None:
        self._context, self._study = context, study

    def check(self) -> None:
        """Check that this command still holds the study's lease.

        Raises:
            LeaseLost: another command has taken the study over.
        """
        self._study.check()

    def look(self, leg: Leg) -> Leg | TrialFailed | TrainingPaused | None:
        """Return a leg with its trial's runs, to be run again; or its outcome if it had ended, None for a result."""
        self._study.deliver_left()  # of a worker of this machine
        runs = self._study.runs_of(self._context.signature(leg.trial))
        for run in runs:
            if run.info.status == "FINISHED":
                return None
            if run.info.status == "FAILED" and run.info.run_id not in self._study.failed_before:
                return TrialFailed(run.data.tags.get("failure", "its worker ended without a word"))
            if leg.pause_at is not None and run.info.status == "KILLED" and rung_reached(run) >= leg.pause_at:
                return TrainingPaused()
        return dataclasses.replace(leg, earlier=runs)

    def fail(self, leg: Leg, reason: str) -> TrialFailed:
        """Record a trial as failed, and return its failure."""
        failure = TrialFailed(reason)
        run = self._study.begin_trial(leg.trial.label, trial_tags(self._context, leg.trial), earlier=leg.earlier)
        with suppress(TrialFailed), self._study.trial(run), failure_logged(run):
            raise failure
        return failure
