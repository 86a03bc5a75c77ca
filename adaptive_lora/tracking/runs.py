"""Runs: their tags, runs outside any study, and searches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from adaptive_lora.errors import TrackingError
from adaptive_lora.tracking.recorder import TrialRun, new_run
from adaptive_lora.tracking.retries import outlast_or_say
from adaptive_lora.tracking.store import Store
from adaptive_lora.tracking.uploader import make_run

KIND = "adaptive_lora.kind"
STUDY_ID = "study_id"
SIGNATURE = "trial_signature"
STUDY_KEY = "study_lineage"
TOKENS = "tokens_digest"
"""Tag: digest of the token ids and loss masks of a study's examples."""
RACE = "race"
"""Tag of a trial with a racing learning rate: `paused` at a rung, or `raced` if it was stopped."""
RACE_STEP = "race.step"
"""Tag: the last rung that the trial reached, in optimiser steps."""
RACE_REASON = "race.reason"
"""Tag: reason why a raced trial was stopped."""
PAUSED, RACED = "paused", "raced"
"""Values of `RACE`."""


def run_name(default: str) -> str:
    """Return the run name in MLFLOW_RUN_NAME, or the default."""
    return os.environ.get("MLFLOW_RUN_NAME") or default


def create(store: Store, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Make a run and wait for its id."""
    run = new_run(store, name, tags or {})
    return outlast_or_say(lambda: make_run(store.client, run))


def let_go(store: Store, status: str) -> None:
    """Close a store at the end of a command that ended with a status.

    Raises:
        Undelivered: the command finished and the store has not received everything.
    """
    try:
        if status == "FINISHED":
            store.settle()
    finally:
        store.close()


@contextmanager
def single_run(store: Store, kind: str, name: str) -> Iterator[TrialRun]:
    """Open a run outside any study: that of `mlflow run`, or a new one."""
    adopted, name = store.parent_run_id, run_name(name)
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
        let_go(store, status)


def search(store: Store, query: str, experiments: list[str] | None = None) -> list[Run]:
    """Return all runs of a query, page by page; MLflow's pages have at most 1,000 runs."""
    found: list[Run] = []
    token: str | None = None
    while True:
        page: Sequence[Run] = store.client.search_runs(
            experiments or [store.experiment_id], query, order_by=["attributes.start_time DESC"], page_token=token
        )
        found.extend(page)
        token = getattr(page, "token", None)
        if not token:
            return found


def find_trials(store: Store, query: str) -> list[Run]:
    """Return the trials in all experiments that match a query in MLflow's syntax, newest first.

    Raises:
        TrackingError: the query is invalid, or nothing is found.
    """
    experiments = [item.experiment_id for item in store.client.search_experiments()]
    try:
        found = search(store, f"{query} and tags.`{KIND}` = 'trial'", experiments)
    except MlflowException as error:
        raise TrackingError(
            f"query {query!r}: {error}. Required MLflow's syntax, such as "
            "\"tags.data_digest = '...' and params.`trial.seed` = '0'\"."
        ) from error
    if not found:
        raise TrackingError(f"no trial in {store.shown_uri} matches {query!r}.")
    return found


def open_comparison(store: Store, key: str, title: str) -> TrialRun:
    """Return the run of the comparison of several studies, found by its key or created."""
    adopted = store.parent_run_id
    earlier = search(store, f"tags.`{KIND}` = 'comparison' and tags.comparison_id = '{key}'")
    if adopted is None and earlier:
        return TrialRun(store, earlier[0].info.run_id)
    run = TrialRun(store, adopted or create(store, title))
    run.tags({KIND: "comparison", "comparison_id": key, MLFLOW_RUN_NAME: title})
    if adopted is None:
        run.end("FINISHED")
    return run
