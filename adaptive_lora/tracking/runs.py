"""One parent run a study, one level of children, one child a trial."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from adaptive_lora.errors import TrackingError
from adaptive_lora.tracking.delivery import make_run
from adaptive_lora.tracking.recorder import Recorder, TrialRun, new_run
from adaptive_lora.tracking.retries import outlast_or_say
from adaptive_lora.tracking.store import Store
from adaptive_lora.tracking.sync import deliver_left

log = logging.getLogger(__name__)

KIND = "adaptive_lora.kind"
STUDY_ID = "study_id"
SIGNATURE = "trial_signature"


class StudyRun(Recorder):
    """The parent run of a study."""

    def __init__(self, store: Store, run_id: str, study_id: str) -> None:
        """Use `open` to find or make it."""
        super().__init__(store, run_id)
        self.study_id = study_id
        self.ends_itself = True

    @classmethod
    def open(cls, store: Store, *, study_id: str, name: str, adopt: bool = True) -> StudyRun:
        """Find the study's parent run or make it, and clear up what an interruption left.

        Under `mlflow run` the run made for this process becomes the parent (with `adopt`): earlier
        trials move to it and an earlier parent is marked as superseded, so that there is one
        parent a study.
        """
        _deliver_left(store)
        earlier = _search(store, f"tags.{STUDY_ID} = '{study_id}' and tags.`{KIND}` = 'study'")
        adopted = store.parent_run_id if adopt else None
        if adopted is not None:
            run_id = adopted
        elif earlier:
            run_id = earlier[0].info.run_id
        else:
            run_id = _create(store, name)
        study = cls(store, run_id, study_id)
        study.ends_itself = study._header["ends"] = adopted is None
        study.tags({STUDY_ID: study_id, KIND: "study", MLFLOW_RUN_NAME: name})
        store.client.update_run(run_id, status="RUNNING")
        for run in earlier:
            if run.info.run_id != run_id:
                store.client.set_tag(run.info.run_id, KIND, "superseded")
                store.client.set_tag(run.info.run_id, "superseded_by", run_id)
        for run in study.children():
            if run.data.tags.get(MLFLOW_PARENT_RUN_ID) != run_id:
                store.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, run_id)
            if run.info.status == "RUNNING":
                store.client.set_terminated(run.info.run_id, "KILLED")
        return study

    @classmethod
    def find(cls, store: Store, study_id: str | None) -> StudyRun:
        """Return a study by its id, or the latest one, from any experiment of the store.

        Raises:
            TrackingError: there is none.
        """
        query = f"tags.`{KIND}` = 'study'"
        if study_id is not None:
            query += f" and tags.{STUDY_ID} = '{study_id}'"
        experiments = [item.experiment_id for item in store.client.search_experiments()]
        runs = _search(store, query, experiments)
        if not runs:
            raise TrackingError(
                f"no study{f' {study_id}' if study_id else ''} in {store.shown_uri}; run "
                "`adaptive-lora study` first, or set --tracking-uri."
            )
        home = dataclasses.replace(store, experiment_id=runs[0].info.experiment_id)
        return cls(home, runs[0].info.run_id, runs[0].data.tags[STUDY_ID])

    def children(self) -> list[Run]:
        """Return the runs of all trials of this study, newest first."""
        return _search(
            self.store, f"tags.{STUDY_ID} = '{self.study_id}' and tags.`{KIND}` = 'trial'"
        )

    def finished(self) -> dict[str, str]:
        """Return trial signature -> run id of the trials that need not run again."""
        return {
            run.data.tags[SIGNATURE]: run.info.run_id
            for run in reversed(self.children())
            if run.info.status == "FINISHED"
        }

    def recorded(self) -> Run:
        """Return the parent run as the store has it."""
        return self.store.client.get_run(self.run_id)

    @contextmanager
    def trial(
        self, name: str, tags: Mapping[str, str], *, adopt: bool = False
    ) -> Iterator[TrialRun]:
        """Open the run of a trial; it ends FINISHED, FAILED, or KILLED where the user stops it.

        Args:
            name: of the run.
            tags: of the run.
            adopt: use the run that `mlflow run` made for this process, where there is one.
        """
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, STUDY_ID: self.study_id, KIND: "trial", **tags}
        if adopt and self.store.parent_run_id is not None:
            run = TrialRun(self.store, self.store.parent_run_id)
            run.tags({MLFLOW_RUN_NAME: name, **tags})
        else:
            run = TrialRun.begin(self.store, name, tags)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            run.end(status)

    def end(self, status: str) -> None:
        """End the parent run, unless `mlflow run` does that itself, and let go of the store.

        Raises:
            Undelivered: the study finished and the store did not take everything.
        """
        if self.ends_itself:
            super().end(status)
        _let_go(self.store, status)


def _deliver_left(store: Store) -> None:
    """Deliver what earlier processes recorded: which trials are finished depends on it.

    Raises:
        TrackingError: the store did not answer.
    """
    for one in deliver_left(store.spool.folder, store.spool.delivery, store.shown_uri):
        if one.waiting:
            raise TrackingError(
                f"records of an earlier process in {one.folder} could not be delivered: "
                f"{one.left}. Run the same command again when the tracking store answers."
            )
        if one.left:
            log.warning("Records in %s are kept: %s.", one.folder, one.left)


def _create(store: Store, name: str) -> str:
    """Make a run and wait for its id."""
    run = new_run(store, name, {})
    return outlast_or_say(lambda: make_run(store.client, run))


def _let_go(store: Store, status: str) -> None:
    """Let go of a store at the end of a command that ended so.

    Raises:
        Undelivered: the command finished and the store did not take everything.
    """
    try:
        if status == "FINISHED":
            store.settle()
    finally:
        store.close(hasty=True)


@contextmanager
def single_run(store: Store, kind: str, name: str) -> Iterator[TrialRun]:
    """Open a run outside any study: that of `mlflow run`, or a new one."""
    adopted = store.parent_run_id
    run = TrialRun.begin(store, name, {}) if adopted is None else TrialRun(store, adopted)
    run.tags({KIND: kind, MLFLOW_RUN_NAME: name})
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if adopted is None:
            run.end(status)
        _let_go(store, status)


def _search(store: Store, query: str, experiments: list[str] | None = None) -> list[Run]:
    """Return all runs of a query; MLflow gives at most 1,000 a page."""
    found: list[Run] = []
    token: str | None = None
    while True:
        page: Sequence[Run] = store.client.search_runs(
            experiments or [store.experiment_id],
            query,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        found.extend(page)
        token = getattr(page, "token", None)
        if not token:
            return found


def find_trials(store: Store, query: str) -> list[Run]:
    """Return the trials of all experiments that a query of MLflow's finds, newest first.

    Raises:
        TrackingError: MLflow does not understand the query, or nothing is found.
    """
    experiments = [item.experiment_id for item in store.client.search_experiments()]
    try:
        found = _search(store, f"{query} and tags.`{KIND}` = 'trial'", experiments)
    except MlflowException as error:
        raise TrackingError(
            f"query {query!r}: {error}. Required MLflow's syntax, such as "
            "\"tags.data_digest = '...' and params.`trial.seed` = '0'\"."
        ) from error
    if not found:
        raise TrackingError(f"no trial in {store.shown_uri} matches {query!r}.")
    return found


def open_comparison(store: Store, key: str, title: str) -> TrialRun:
    """Return the run that holds the comparison of several studies, found by its key or made."""
    adopted = store.parent_run_id
    earlier = _search(store, f"tags.`{KIND}` = 'comparison' and tags.comparison_id = '{key}'")
    if adopted is None and earlier:
        return TrialRun(store, earlier[0].info.run_id)
    run = TrialRun(store, adopted or _create(store, title))
    run.tags({KIND: "comparison", "comparison_id": key, MLFLOW_RUN_NAME: title})
    if adopted is None:
        run.end("FINISHED")
    return run
