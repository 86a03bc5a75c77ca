"""Runs of a study: one parent run, one child run per trial, and leases of trials among processes."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from adaptive_lora.errors import LeaseLost, TrackingError
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.leases import LEASE, Leases
from adaptive_lora.tracking.recorder import Recorder
from adaptive_lora.tracking.runs import (
    KIND,
    RACE,
    RACE_REASON,
    RACE_STEP,
    RACED,
    SIGNATURE,
    STUDY_ID,
    STUDY_KEY,
    create,
    let_go,
    search,
)
from adaptive_lora.tracking.sync import belongs, deliver_left

log = logging.getLogger(__name__)

_POLL = 2.0
"""Seconds between two checks of another process's progress."""
_SOON = 0.1
"""Seconds between two checks of records that another process is delivering."""
_ARRIVAL = 60.0
"""Seconds to wait without progress for the delivery of a new lease."""


class TrialStatus(StrEnum):
    """Status of a trial that this process does not run."""

    DONE = "done"
    """Finished, or just failed in another process."""
    TAKEN = "taken"
    """Leased by another process."""
    PAUSED = "paused"
    """Paused by this process at the wanted step."""


class StudyRun(Recorder):
    """The parent run of a study."""

    def __init__(self, store: Store, run_id: str, study_id: str) -> None:
        """Use `open` to find or make it instead."""
        super().__init__(store, run_id)
        self.study_id = study_id
        self.ends_itself = True
        self._leases: Leases | None = None
        self.failed_before = frozenset[str]()
        """Ids of the runs that had failed before this process opened the study."""

    @classmethod
    def open(cls, store: Store, *, study_id: str, name: str, adopt: bool = True, silence: float = 120.0) -> StudyRun:
        """Find or make the study's parent run, and deliver records left by an interruption.

        Under `mlflow run` the run made for this process becomes the parent (with `adopt`): earlier
        trials move to it and an earlier parent is marked as superseded, so that a study has one
        parent.

        Args:
            store: tracking store.
            study_id: id of the study.
            name: name of a new parent.
            adopt: whether the run of `mlflow run` becomes the parent.
            silence: seconds without a heartbeat after which other processes count as dead.
        """
        _deliver_left(store)
        leases = Leases(store, study_id, silence)
        with leases.lock():
            earlier = search(store, f"tags.{STUDY_ID} = '{study_id}' and tags.`{KIND}` = 'study'")
            adopted = store.parent_run_id if adopt else None
            run_id = adopted or (earlier[0].info.run_id if earlier else None)
            run_id = run_id or create(store, name, {STUDY_ID: study_id, KIND: "study"})
            study = cls(store, run_id, study_id)
            study._leases = leases
            study.ends_itself = study._header["ends"] = adopted is None
            study.tags({STUDY_ID: study_id, KIND: "study", MLFLOW_RUN_NAME: name})
            store.client.update_run(run_id, status="RUNNING")
            for run in earlier:
                if run.info.run_id != run_id:
                    _supersede(store, run, run_id)
            trials = study.children()
            for run in trials:
                if run.data.tags.get(MLFLOW_PARENT_RUN_ID) != run_id:
                    store.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, run_id)
            study.failed_before = frozenset(run.info.run_id for run in trials if run.info.status == "FAILED")
        return study

    @classmethod
    def find(cls, store: Store, study_id: str | None) -> StudyRun:
        """Return a study by its id, or the latest one, from any experiment of the store.

        Raises:
            TrackingError: there is no such study.
        """
        query = f"tags.`{KIND}` = 'study'"
        if study_id is not None:
            if not re.fullmatch(r"[\w.\-]+", study_id):
                raise TrackingError(f"'{study_id:.200}' is no study id, such as study-0a1b2c3d4e.")
            query += f" and tags.{STUDY_ID} = '{study_id}'"
        experiments = [item.experiment_id for item in store.client.search_experiments()]
        runs = search(store, query, experiments)
        if not runs:
            raise TrackingError(
                f"no study{f' {study_id}' if study_id else ''} in {store.shown_uri}; run "
                "`adaptive-lora study` first, or set --tracking-uri."
            )
        home = dataclasses.replace(store, experiment_id=runs[0].info.experiment_id)
        return cls(home, runs[0].info.run_id, runs[0].data.tags[STUDY_ID])

    @staticmethod
    def of_study_key(store: Store, study_key: str) -> list[Run]:
        """Return the parent runs with a study key, newest first."""
        return search(store, f"tags.{STUDY_KEY} = '{study_key}' and tags.`{KIND}` = 'study'")

    def children(self) -> list[Run]:
        """Return the runs of all trials of this study, newest first."""
        return search(self.store, self._trials)

    def runs_of(self, signature: str) -> list[Run]:
        """Return the runs of the trial with a signature, newest first, by a search in the store."""
        return search(self.store, f"{self._trials} and tags.{SIGNATURE} = '{signature}'")

    @property
    def _trials(self) -> str:
        return f"tags.{STUDY_ID} = '{self.study_id}' and tags.`{KIND}` = 'trial'"

    def finished(self) -> dict[str, str]:
        """Return trial signature -> run id of the finished trials."""
        return {
            run.data.tags[SIGNATURE]: run.info.run_id
            for run in reversed(self.children())
            if run.info.status == "FINISHED"
        }

    def recorded(self) -> Run:
        """Return the parent run from the store."""
        return self.store.client.get_run(self.run_id)

    @property
    def leases(self) -> Leases:
        """The leases of this process; a study from `find` has none."""
        assert self._leases is not None, "open the study"
        return self._leases

    def take(
        self, name: str, tags: Mapping[str, str], *, adopt: bool = False, pause_at: int | None = None
    ) -> Recorder | TrialStatus:
        """Lease a trial for this process: continue its run, or begin one.

        Args:
            name: name of the run.
            tags: tags of the run, including its signature.
            adopt: whether to use the run that `mlflow run` made for this process, if there is one.
            pause_at: optimiser step up to which it is run; None: to its end.

        Returns:
            The run, or the trial's status if there is nothing to do for this process.
        """
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, STUDY_ID: self.study_id, KIND: "trial", **tags}
        tags[LEASE] = self.leases.mine
        if self.store.outbox.away:
            return self._begin_alone(name, tags)
        try:
            status = self._status(self.runs_of(tags[SIGNATURE]), pause_at)
            if status is not None:
                return status
            with self.leases.lock():
                runs = self.runs_of(tags[SIGNATURE])
                return self._status(runs, pause_at) or self._take(runs, name, tags, adopt)
        except TrackingError:
            if not self.store.outbox.away:
                raise
            return self._begin_alone(name, tags)

    def _status(self, runs: Sequence[Run], pause_at: int | None) -> TrialStatus | None:
        """Return a trial's status, or None if this process may lease it."""
        for run in runs:
            if run.info.status == "FINISHED":
                return TrialStatus.DONE
            if run.info.status == "FAILED" and run.info.run_id not in self.failed_before:
                return TrialStatus.DONE  # just finished by another process
            if run.info.status == "KILLED" and pause_at is not None and rung_reached(run) >= pause_at:
                return TrialStatus.DONE
        free = [self._is_free(run) for run in _unfinished(runs)]
        return None if all(free) else TrialStatus.TAKEN

    def _is_free(self, run: Run) -> bool:
        """Return whether no other living process has the lease of a run."""
        return self.leases.is_free(run.info.run_id, run.data.tags.get(LEASE, ""))

    def _take(self, runs: Sequence[Run], name: str, tags: Mapping[str, str], adopt: bool) -> Recorder:
        """Continue the oldest unfinished run of a trial, or begin one; requires the study's lock."""
        given, left = self.store.parent_run_id if adopt else None, _unfinished(runs)
        if given is not None:
            run = Recorder(self.store, given)
        elif left:
            oldest = left.pop()
            self.store.client.set_tag(oldest.info.run_id, LEASE, tags[LEASE])
            if RACE in oldest.data.tags:
                tags = {**tags, RACE: ""}  # the trial continues
            _deliver_of(self.store, oldest)
            run = Recorder.resume(self.store, oldest.info.run_id)
        else:
            run = Recorder.begin(self.store, name, tags)
        run.tags({MLFLOW_RUN_NAME: name, **tags})
        run.flush(_ARRIVAL)  # no other process may find the trial without its lease
        for other in left:
            _supersede(self.store, other, run.run_id)
        return run

    def _begin_alone(self, name: str, tags: Mapping[str, str]) -> Recorder:
        """Begin a trial while the store is unreachable; another process may begin it too."""
        log.warning("%s begins without a lease: the tracking store is unreachable.", name)
        return Recorder.begin(self.store, name, tags)

    @contextmanager
    def trial(self, run: Recorder) -> Iterator[Callable[[], None]]:
        """Keep a trial's lease inside the block; the run ends FINISHED, FAILED, or KILLED to be continued.

        The yielded function must be called regularly: it raises `LeaseLost` if another process took
        the trial over because this one seemed dead.
        """
        status = "FAILED"
        try:
            with self.leases.held(lambda: run.run_id) as check:
                yield check
            status = "FINISHED"
        except LeaseLost:
            status = ""
            raise
        except (KeyboardInterrupt, TrackingError, OSError, MemoryError):
            status = "KILLED"
            raise
        finally:
            if status:
                run.end(status)
            else:
                run.leave()
            if status == "KILLED":
                self.leases.release(run)

    def end_raced(self, reasons: Mapping[str, str]) -> None:
        """End trials that a race stopped (run id -> reason), except those that another process runs."""
        with self.leases.lock():
            for run in self.children():
                reason = reasons.get(run.info.run_id)
                if reason is None or not self._is_free(run) or run.info.status in ("FINISHED", "FAILED"):
                    continue
                for key, value in ((RACE_REASON, reason), (RACE, RACED)):
                    self.store.client.set_tag(run.info.run_id, key, value)
                if run.info.status == "RUNNING":  # left by a dead process
                    self.store.client.set_terminated(run.info.run_id, "KILLED")

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Hold the lock of the study's comparison inside the block."""
        _deliver_left(self.store)  # records of processes that died meanwhile
        while True:
            with self.leases.lock():
                if self._is_free(self.recorded()):
                    self.store.client.set_tag(self.run_id, LEASE, self.leases.mine)
                    break
            time.sleep(_POLL)
        try:
            with self.leases.held(lambda: self.run_id):
                yield
        finally:
            self.leases.release(self)

    def end(self, status: str) -> None:
        """End the parent run, unless `mlflow run` does so itself, and close the store.

        Raises:
            Undelivered: the study finished and the store has not received everything.
        """
        if self._leases is not None:
            self._leases.owner.ended()
        if self.ends_itself:
            super().end(status)
        let_go(self.store, status)


def _deliver_of(store: Store, run: Run) -> None:
    """Deliver remaining records, and wait while another process is delivering records of a run.

    The run's metrics are read next, and missing points are recorded again: a point in delivery would
    be recorded twice.

    Raises:
        TrackingError: the store did not answer.
    """
    until = time.monotonic() + _ARRIVAL
    while any(belongs(folder, run) for folder in _deliver_left(store)):
        if time.monotonic() > until:
            log.warning("Another process still has records of run %s.", run.info.run_id)
            return
        time.sleep(_SOON)


def _deliver_left(store: Store) -> list[Path]:
    """Deliver the records of earlier processes, which determine the finished trials.

    Returns the journals locked by other processes; raises TrackingError if the store does not answer.
    """
    held = []
    for one in deliver_left(store.outbox.folder, store.outbox.uploader, store.shown_uri):
        if one.waiting:
            raise TrackingError(
                f"records of an earlier process in {one.folder} could not be delivered: "
                f"{one.left}. Run the same command again when the tracking store answers."
            )
        if one.held and not store.outbox.holds(one.folder):
            held.append(one.folder)
        elif one.left and not one.held:
            log.warning("Records in %s are kept: %s.", one.folder, one.left)
    return held


def rung_reached(run: Run) -> int:
    """Return the last rung reached by a racing trial, in optimiser steps; 0: none."""
    text = run.data.tags.get(RACE_STEP, "")
    return int(text) if text.isdecimal() else 0


def _unfinished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.info.status not in ("FINISHED", "FAILED")]


def _supersede(store: Store, run: Run, by: str) -> None:
    """Remove a run from the study in favour of another."""
    store.client.set_tag(run.info.run_id, KIND, "superseded")
    store.client.set_tag(run.info.run_id, "superseded_by", by)
    if run.info.status == "RUNNING":
        store.client.set_terminated(run.info.run_id, "KILLED")
