"""Runs of a study: one parent run, one child run per trial."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from adaptive_lora.errors import TrackingError
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.leases import Lease
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
    each_run,
    let_go,
    search,
)
from adaptive_lora.tracking.sync import belongs, deliver_left

log = logging.getLogger(__name__)

_SOON = 0.1
"""Seconds between two checks of records that another process is delivering."""
_ARRIVAL = 60.0
"""Seconds to wait for records that another process is delivering."""


class StudyRun(Recorder):
    """The parent run of a study.

    The command that opens a study holds its lease and begins its trials. Its worker processes use objects that are
    made from the ids alone: the lease covers them.
    """

    def __init__(self, store: Store, run_id: str, study_id: str) -> None:
        """Use `open` to find or make the run and take its lease."""
        super().__init__(store, run_id)
        self.study_id = study_id
        self.ends_itself = True
        self._lease: Lease | None = None
        self.finished_before = frozenset[str]()
        """Signatures of the trials that had finished before this command opened the study."""
        self.failed_before = frozenset[str]()
        """Ids of the runs that had failed before this command opened the study."""
        self.unfinished: Mapping[str, Sequence[Run]] = {}
        """Trial signature -> runs that earlier commands left unfinished, newest first."""

    @classmethod
    def open(
        cls,
        store: Store,
        *,
        study_id: str,
        name: str,
        adopt: bool = True,
        signature: str = "",
        silence: float = 120.0,
        wait: bool = False,
        say: Callable[[str], None] = log.warning,
    ) -> StudyRun:
        """Find or make the study's parent run, take its lease, and deliver records left by an interruption.

        Under `mlflow run` the run made for this process becomes the parent (with `adopt`): earlier
        trials move to it and an earlier parent is marked as superseded, so that a study has one
        parent.

        Args:
            store: tracking store.
            study_id: id of the study.
            name: name of a new parent.
            adopt: whether the run of `mlflow run` becomes the parent.
            signature: signature of the only trial that is run; empty: the whole study.
            silence: seconds without a heartbeat after which other commands count as dead.
            wait: whether to wait until another command on this study has ended.
            say: receives a line if there is something to wait for.

        Raises:
            StudyInUse: another command runs the study, and `wait` is not set.
        """
        lease = Lease(store, study_id, signature=signature, silence=silence)
        adopted = store.parent_run_id if adopt else None
        tags = {STUDY_ID: study_id, KIND: "study"}
        made: list[str] = []

        def parents() -> list[Run]:
            query = f"tags.{STUDY_ID} = '{study_id}' and tags.`{KIND}` = 'study'"
            return sorted(search(store, query), key=lambda run: (run.info.start_time, run.info.run_id))

        def place(parent: Run | None) -> str:
            if adopted is not None:
                for key, value in tags.items():
                    store.client.set_tag(adopted, key, value)
            elif parent is not None:
                return str(parent.info.run_id)
            made.append(adopted or create(store, name, tags))
            return made[-1]

        def withdraw(run_id: str) -> None:
            if run_id in made:
                _supersede(store, store.client.get_run(run_id), "")

        found = lease.take(parents, place, withdraw, wait=wait, say=say)
        try:
            study = cls(store, lease.run_id, study_id)
            study._lease = lease
            study.ends_itself = study._header["ends"] = adopted is None
            study._begin(name, [run for run in found if not lease.others(run)])
        except BaseException:
            lease.release()
            raise
        return study

    def _begin(self, name: str, parents: Sequence[Run]) -> None:
        """Set the parent run to RUNNING, put the trials beneath it, and read what earlier commands left.

        Args:
            name: name of the run.
            parents: parent runs of the study that no other command uses.
        """
        _deliver_left(self.store)
        self.tags({STUDY_ID: self.study_id, KIND: "study", MLFLOW_RUN_NAME: name})
        self.store.client.update_run(self.run_id, status="RUNNING")
        for run in parents:
            if run.info.run_id != self.run_id:
                _supersede(self.store, run, self.run_id)
        failed, finished, unfinished = set[str](), set[str](), list[Run]()
        for run in self.each_child():
            if run.data.tags.get(MLFLOW_PARENT_RUN_ID) != self.run_id:
                self.store.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, self.run_id)
            if run.info.status == "FAILED":
                failed.add(run.info.run_id)
            elif run.info.status == "FINISHED":
                finished.add(run.data.tags.get(SIGNATURE, ""))
            else:
                unfinished.append(run)
        self.failed_before, self.finished_before = frozenset(failed), frozenset(finished)
        self.unfinished = by_signature(unfinished)

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
        return list(self.each_child())

    def each_child(self) -> Iterator[Run]:
        """Yield them, for studies of thousands of trials."""
        return each_run(self.store, self._trials)

    def runs_of(self, signature: str) -> list[Run]:
        """Return the runs of the trial with a signature, newest first, by a search in the store."""
        return search(self.store, f"{self._trials} and tags.{SIGNATURE} = '{signature}'")

    @property
    def _trials(self) -> str:
        return f"tags.{STUDY_ID} = '{self.study_id}' and tags.`{KIND}` = 'trial'"

    def recorded(self) -> Run:
        """Return the parent run from the store."""
        return self.store.client.get_run(self.run_id)

    def check(self) -> None:
        """Check that this command still holds the study's lease; does nothing in its worker processes.

        Raises:
            LeaseLost: another command has taken the study over.
        """
        if self._lease is not None:
            self._lease.check()

    def begin_trial(
        self, name: str, tags: Mapping[str, str], *, earlier: Sequence[Run] | None = None, adopt: bool = False
    ) -> Recorder:
        """Begin the run of a trial, or continue the oldest of its unfinished ones.

        A trial without earlier runs takes no request to the store.

        Args:
            name: name of the run.
            tags: tags of the run, including its signature.
            earlier: runs of the trial that are known, newest first; None: the store is asked, after the records of
                dead processes of this machine have been delivered.
            adopt: whether to use the run that `mlflow run` made for this process, if there is one.
        """
        self.check()
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, STUDY_ID: self.study_id, KIND: "trial", **tags}
        if earlier is None or _unfinished(earlier):
            try:
                return self._continue_trial(name, tags, earlier, adopt)
            except TrackingError:
                if not self.store.outbox.away:
                    raise
                log.warning("%s begins anew: the tracking store is unreachable.", name)
        return self._begin_trial(name, tags, adopt)

    def _begin_trial(self, name: str, tags: Mapping[str, str], adopt: bool) -> Recorder:
        given = self.store.parent_run_id if adopt else None
        if given is None:
            return Recorder.begin(self.store, name, tags)
        run = Recorder(self.store, given)
        run.tags({MLFLOW_RUN_NAME: name, **tags})
        return run

    def _continue_trial(
        self, name: str, tags: Mapping[str, str], earlier: Sequence[Run] | None, adopt: bool
    ) -> Recorder:
        """Continue the oldest unfinished run of a trial, and remove the others from the study."""
        if earlier is None:
            _deliver_left(self.store)
            earlier = self.runs_of(tags[SIGNATURE])
        left = _unfinished(earlier)
        if not left or (adopt and self.store.parent_run_id is not None):
            run = self._begin_trial(name, tags, adopt)
        else:
            oldest = left.pop()
            if RACE in oldest.data.tags:
                tags = {**tags, RACE: ""}  # the trial continues
            _deliver_of(self.store, oldest)
            run = Recorder.resume(self.store, oldest.info.run_id)
            run.tags({MLFLOW_RUN_NAME: name, **tags})
        for other in left:
            _supersede(self.store, other, run.run_id)
        return run

    @contextmanager
    def trial(self, run: Recorder) -> Iterator[None]:
        """End a trial's run after the block: FINISHED, FAILED, or KILLED to be continued.

        If the study's lease was lost, its status is left to the command that took it.
        """
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, TrackingError, OSError, MemoryError):
            status = "KILLED"
            raise
        finally:
            if self._is_lost:
                run.leave()
            else:
                run.end(status)

    def end_raced(self, reasons: Iterable[tuple[Run, str]]) -> None:
        """End trials that a race stopped: unfinished runs, each with the reason."""
        for run, reason in reasons:
            for key, value in ((RACE_REASON, reason), (RACE, RACED)):
                self.store.client.set_tag(run.info.run_id, key, value)
            if run.info.status == "RUNNING":  # left by a dead process
                self.store.client.set_terminated(run.info.run_id, "KILLED")

    def deliver_left(self) -> None:
        """Deliver the records of processes of this machine that died since the study was opened.

        Raises:
            LeaseLost: another command has taken the study over.
            TrackingError: the store does not answer.
        """
        self.check()
        _deliver_left(self.store)

    @property
    def _is_lost(self) -> bool:
        return self._lease is not None and self._lease.is_lost

    def end(self, status: str) -> None:
        """End the parent run, unless `mlflow run` does so itself, close the store and release the lease.

        Raises:
            Undelivered: the study finished and the store has not received everything.
        """
        try:
            if self._is_lost:
                self.leave()
            elif self.ends_itself:
                super().end(status)
            let_go(self.store, status)
        finally:
            if self._lease is not None:
                self._lease.release()


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


def by_signature(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return trial signature -> its runs, in the given order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.data.tags.get(SIGNATURE, ""), []).append(run)
    return found


def _unfinished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.info.status not in ("FINISHED", "FAILED")]


def _supersede(store: Store, run: Run, by: str) -> None:
    """Remove a run from the study, in favour of another if there is one."""
    store.client.set_tag(run.info.run_id, KIND, "superseded")
    if by:
        store.client.set_tag(run.info.run_id, "superseded_by", by)
    if run.info.status == "RUNNING":
        store.client.set_terminated(run.info.run_id, "KILLED")
