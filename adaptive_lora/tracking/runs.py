"""Runs: their tags, runs outside any study, searches, and the results of trials as artifacts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from numpy.typing import NDArray

from adaptive_lora.config import TrackingConfig, current_label
from adaptive_lora.config.store_place import store_uri
from adaptive_lora.errors import AllocationError, TrackingError, brief, unknown_name
from adaptive_lora.models.collector import without_collector
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.results import NATS_PER_TOKEN, RACED_STATUS, EvalResult, RetainedScores, TrainResult, TrialRecord
from adaptive_lora.tracking.connection import Store, opened
from adaptive_lora.tracking.recorder import Recorder, new_run
from adaptive_lora.tracking.retries import outlast_or_say
from adaptive_lora.tracking.shared import Shared
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
RETAINED = "retained"
"""Tag: digests of the retained data that a trial is scored on, or of a study, separated by spaces."""
RESULT = "trial.json"
PLAN = "rank_plan.json"
HISTORY = "rank_history.json"
_TOGETHER = 1_000
"""Number of trials read at once: as many runs as MLflow's pages have."""
CORRUPTION = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""Exceptions of reading values from a corrupt file."""


def run_name(default: str) -> str:
    """Return the run name in MLFLOW_RUN_NAME, or the default."""
    return os.environ.get("MLFLOW_RUN_NAME") or default


def create(store: Store, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Make a run and wait for its id."""
    run = new_run(store, name, tags or {})
    return str(outlast_or_say(lambda: make_run(store.client, run)).info.run_id)


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
def single_run(store: Store, kind: str, name: str) -> Iterator[Recorder]:
    """Open a run outside any study: that of `mlflow run`, or a new one."""
    adopted, name = store.parent_run_id, run_name(name)
    run = Recorder.begin(store, name, {}) if adopted is None else Recorder(store, adopted)
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
    """Return all runs of a query, newest first."""
    return list(each_run(store, query, experiments))


def each_run(store: Store, query: str, experiments: list[str] | None = None) -> Iterator[Run]:
    """Yield all runs of a query, newest first; a run has some 30 kB, so thousands should not be kept."""
    return _pages(store.client, experiments or [store.experiment_id], query, "DESC")


def _pages(client: MlflowClient, experiments: list[str], query: str, order: str) -> Iterator[Run]:
    """Yield all runs of a query by their start, page by page; MLflow's pages have at most 1,000 runs."""
    token: str | None = None
    while True:
        by = [f"attributes.start_time {order}"]
        with without_collector():  # MLflow makes 150 objects of a run
            page: Sequence[Run] = client.search_runs(experiments, query, order_by=by, page_token=token)
        token = getattr(page, "token", None)
        yield from page
        if not token:
            return


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


def find_runs(config: TrackingConfig, query: str, experiments: str | None) -> list[Run]:
    """Return runs of anyone that match a query in MLflow's syntax, oldest first; nothing is written.

    Args:
        config: where the store is.
        query: filter; empty: all runs.
        experiments: name of an experiment, or several separated by commas; None: all.

    Raises:
        TrackingError: an experiment does not exist, the query is invalid, or nothing is found.
    """
    uri = store_uri(config)
    with opened(uri, must_exist=True) as client:
        known = {found.name: found.experiment_id for found in client.search_experiments()}
        listed = [name.strip() for name in (experiments or "").split(",") if name.strip()]
        names = [experiments] if experiments in known else listed
        if absent := [name for name in names if name not in known]:
            raise TrackingError(unknown_name("experiment", absent[0], known))
        try:
            found = list(_pages(client, [known[name] for name in names] or list(known.values()), query, "ASC"))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise TrackingError(
                f"query {query!r}: {str(error).rstrip('.')}. Required MLflow's syntax, such as \"tags.sweep = 'lora'\"."
            ) from error
    if not found:
        where = f"experiment {experiments}" if experiments else "its experiments"
        raise TrackingError(f"no run in {hide_credentials(uri)}, {where}, matches {query!r}.")
    return found


def open_comparison(store: Store, key: str, title: str) -> Recorder:
    """Return the run of the comparison of several studies, found by its key or created."""
    adopted = store.parent_run_id
    earlier = search(store, f"tags.`{KIND}` = 'comparison' and tags.comparison_id = '{key}'")
    if adopted is None and earlier:
        return Recorder(store, earlier[0].info.run_id)
    run = Recorder(store, adopted or create(store, title))
    run.tags({KIND: "comparison", "comparison_id": key, MLFLOW_RUN_NAME: title})
    if adopted is None:
        run.end("FINISHED")
    return run


# The results of a trial as artifacts of its run.


def eval_to_dict(result: EvalResult) -> dict[str, Any]:
    """Return per-example scores as JSON-ready values; floats are exact."""
    exact = result.exact_match_E
    return {
        "example_ids": list(result.example_ids),
        "nll": result.nll_E.tolist(),
        "tokens": result.tokens_E.tolist(),
        "correct": None if result.correct_E is None else result.correct_E.tolist(),
        "exact_match": None if exact is None else exact.tolist(),
        "further": {name: values.tolist() for name, values in result.further_E.items()},
        "overall": dict(result.overall),
        "unit": result.unit,
    }


def eval_from_dict(values: dict[str, Any]) -> EvalResult:
    """Read what `eval_to_dict` wrote.

    Raises:
        KeyError, TypeError, ValueError: the values are not scores, or their columns do not match.
    """
    ids, exact, correct = values["example_ids"], values["exact_match"], values["correct"]
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise TypeError("example_ids is no list of texts")
    tokens_E = _column("tokens", values["tokens"], len(ids), whole=True)
    if (tokens_E < 0).any():
        raise ValueError("tokens holds a negative number")
    overall = values.get("overall", {})  # this and the next two are not in earlier studies
    if not all(isinstance(score, int | float) for score in overall.values()):
        raise TypeError("overall holds something other than numbers")
    return EvalResult(
        example_ids=tuple(ids),
        nll_E=_column("nll", values["nll"], len(ids)),
        tokens_E=tokens_E,
        correct_E=None if correct is None else _column("correct", correct, len(ids), whole=True),
        exact_match_E=None if exact is None else _column("exact_match", exact, len(ids)),
        further_E={
            str(name): _column(str(name), column, len(ids)) for name, column in values.get("further", {}).items()
        },
        overall=overall,
        unit=str(values.get("unit", NATS_PER_TOKEN)),
    )


def record_retained(run: Recorder, retained: Mapping[str, RetainedScores], earlier: str = "") -> None:
    """Log a trial's scores on retained data (digest -> scores), one artifact each, and the tag that names them.

    Args:
        run: run of the trial.
        retained: the scores.
        earlier: value of the tag so far.
    """
    for key, scores in retained.items():
        parts = {"before": eval_to_dict(scores.before), "after": eval_to_dict(scores.after)}
        run.json(f"{RETAINED}/{key}.json", {"source": scores.source, **parts})
    if retained:
        run.tags({RETAINED: " ".join(dict.fromkeys([*earlier.split(), *retained]))})


def _read_retained(store: Store, run: Run) -> dict[str, RetainedScores]:
    """Return a trial's scores on retained data by digest."""
    found = {}
    for key in run.data.tags.get(RETAINED, "").split():
        if not re.fullmatch("[0-9a-f]{16}", key):
            raise ValueError(f"the tag {RETAINED} holds '{key:.80}', which is no digest")
        values = store.read_json(run, f"{RETAINED}/{key}.json")
        before, after = eval_from_dict(values["before"]), eval_from_dict(values["after"])
        found[key] = RetainedScores(source=str(values["source"]), before=before, after=after)
    return found


def _column(name: str, values: Any, examples: int, *, whole: bool = False) -> NDArray[Any]:
    """Return a column of one number per example, as float64 or int64."""
    kinds = int if whole else (int, float)
    if not isinstance(values, list) or not all(isinstance(each, kinds) for each in values):
        raise TypeError(f"{name} is no list of {'whole ' if whole else ''}numbers")
    if len(values) != examples:
        raise ValueError(f"{name} has {len(values)} values for {examples} examples")
    return np.array(values, dtype=np.int64 if whole else np.float64)


def _curve(values: Any) -> tuple[tuple[int, float], ...]:
    steps = _whole_numbers("validation_curve", [step for step, _ in values])
    losses = [math.nan if loss is None else float(loss) for _, loss in values]
    return tuple(zip(steps, losses, strict=True))


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    return tuple(_column(name, values, len(values), whole=True).tolist())


def result_to_dict(train: TrainResult, test: EvalResult) -> dict[str, Any]:
    """Return a trial's losses and scores for the artifact; non-finite numbers are None."""
    tokens = (0, *train.step_tokens)
    return {
        "losses": [_number_or_none(loss) for loss in train.losses],
        "validation_curve": [[step, _number_or_none(v)] for step, v in train.validation_curve],
        "validation_tokens": [tokens[step] for step, _ in train.validation_curve],
        "validation_loss": train.validation_loss,
        "test": eval_to_dict(test),
    }


def _number_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_trials(store: Store, runs: Iterable[Run]) -> list[TrialRecord]:
    """Return the records of trials that finished, failed, or were stopped by a race.

    Killed and running ones are left out.

    Raises:
        TrackingError: an artifact of a finished trial is missing or corrupt.
    """
    ended = (run for run in runs if run.info.status in ("FINISHED", "FAILED") or is_raced(run))
    shared, records = Shared(), list[TrialRecord]()
    with ThreadPoolExecutor(max_workers=8) as workers:  # a server answers several at once
        while some := list(islice(ended, _TOGETHER)):
            records += workers.map(lambda run: _record(store, run, shared), some)
    return records


def is_raced(run: Run) -> bool:
    """Return whether a race ended a trial: it is KILLED and not being continued."""
    return run.info.status == "KILLED" and run.data.tags.get(RACE) == RACED


def _record(store: Store, run: Run, shared: Shared) -> TrialRecord:
    tags, metrics = run.data.tags, dict(run.data.metrics)
    method, lr, seed, fold = identity_of(run)
    identity: dict[str, Any] = {
        "run_id": run.info.run_id,
        "method": method,
        "seed": seed,
        "fold": fold,
        "lr": lr,
        "status": run.info.status,
        "metrics": metrics,
        "tags": shared.texts(tags),
        "settings": shared.texts(run.data.params),
    }
    if is_raced(run):
        identity["status"] = RACED_STATUS
        return TrialRecord(**identity, reason=tags.get(RACE_REASON, "behind other rates"))
    if run.info.status == "FAILED":
        reason = tags.get("failure", "ended without a word; see the run's page in the tracking UI")
        return TrialRecord(**identity, reason=reason)
    try:
        result, plan = (store.read_json(run, name) for name in (RESULT, PLAN))
        planned = shared.plan(plan)
        return TrialRecord(
            **identity,
            trainable_parameters=planned["trainable_parameters"],
            validation_loss=float(result["validation_loss"]),
            validation_curve=_curve(result["validation_curve"]),
            validation_tokens=_whole_numbers("tokens", result.get("validation_tokens", [])),
            test=shared.scores(eval_from_dict(result["test"])),
            plan=planned,
            retained=_read_retained(store, run),
        )
    except (OSError, *CORRUPTION, AllocationError) as error:
        raise TrackingError(
            f"run {run.info.run_id} ({method}, seed {seed}) is FINISHED but its "
            f"artifacts cannot be read ({brief(error)}); delete the run and "
            "repeat the study command."
        ) from error


def identity_of(run: Run) -> tuple[str, float, int, int]:
    """Return (method, learning rate, seed, fold) of a trial's run.

    Raises:
        TrackingError: its tags lack them, because they were changed.
    """
    tags = run.data.tags
    try:
        method, lr = current_label(tags["method"]), float(tags["lr"])
        return method, lr, int(tags["seed"]), int(tags["fold"])
    except (KeyError, ValueError) as error:
        raise TrackingError(
            f"run {run.info.run_id} has no tags of a trial any more ({brief(error)}); required "
            "method, lr, seed and fold. Delete the run and repeat the study command."
        ) from error
