"""The tracking store: found, checked and prepared before a study starts."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from adaptive_lora.config import TrackingConfig
from adaptive_lora.errors import TrackingError
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.tracking.delivery import Delivery
from adaptive_lora.tracking.retries import STORE_ERRORS, outlast, patient, suppress_existing
from adaptive_lora.tracking.spool import FOLDER, Spool
from adaptive_lora.tracking.store import Store

DEFAULT_STORE = "sqlite:///mlflow.db"
TRAINING = "custom_model_development"
"""Kind of experiment that the tracking UI shows as model training, not as evaluations of agents."""
_START = 4.0
"""Seconds in which a store has to answer at the start of a command."""
LEAST_FREE_BYTES = 200 * 2**20
"""A study refuses to start with less free disk for artifacts than this."""


def connect(config: TrackingConfig, *, must_exist: bool = False) -> Store:
    """Reach the tracking store and find or make the experiment.

    Under `mlflow run` the run and experiment that it made are used: setting another experiment
    there is an error of MLflow's (mlflow issue 2735).

    Args:
        config: where the store is.
        must_exist: for commands that only read, which make no store where there is none.

    Raises:
        TrackingError: unreachable, not a store that MLflow takes, or no disk left.
    """
    uri = store_uri(config)
    _quieten()
    _own_retries()
    _check_disk(uri)
    _check_sqlite(uri, must_exist)
    _check_output(Path(config.output))
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    parent = os.environ.get("MLFLOW_RUN_ID")
    with _reaching(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        if parent is not None:
            run = outlast(lambda: _parent_run(client, uri, parent), _START)
            experiment_id = run.info.experiment_id
        else:
            experiment_id = outlast(lambda: _experiment(client, config.experiment), _START)
            # logged models go by it
            outlast(lambda: mlflow.set_experiment(experiment_id=experiment_id), _START)
    return Store(
        client=patient(client),
        uri=uri,
        experiment_id=experiment_id,
        parent_run_id=parent,
        spool=Spool(Path(config.output).absolute() / FOLDER, Delivery(client, uri)),
    )


def reach(uri: str) -> Delivery:
    """Reach a store in order to deliver to it, without making anything there.

    Raises:
        TrackingError: unreachable.
    """
    _quieten()
    _own_retries()
    _check_sqlite(uri, must_exist=False)
    with _reaching(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        outlast(lambda: client.search_experiments(max_results=1), _START)
    return Delivery(client, uri)


def store_uri(config: TrackingConfig) -> str:
    """Return where results are tracked: the option, the environment, or the default.

    A relative SQLite path is made absolute: MLflow keeps one connection a URI, so the same relative
    URI would go on meaning the folder in which it was first used.
    """
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    path = uri.removeprefix("sqlite:///")
    if path == uri or not path or path.startswith("/"):
        return uri
    return f"sqlite:///{Path.cwd() / path}"


def probe(config: TrackingConfig) -> str:
    """Make one real call to the store, without creating anything; return what was found.

    Raises:
        TrackingError: unreachable.
    """
    uri = store_uri(config)
    path = uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite:///") and not Path(path).exists():
        return f"{path} will be made by the first study"
    _quieten()
    with _reaching(uri):
        experiments = MlflowClient(tracking_uri=uri).search_experiments(max_results=10)
    return f"{hide_credentials(uri)} answers ({len(experiments)} or more experiments)"


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Turn every way in which a store can be unusable into one clear error."""
    try:
        with _short_timeout():
            yield
    except (*STORE_ERRORS, ImportError) as error:
        reason = next(iter(hide_credentials(str(error)).splitlines()), type(error).__name__)
        code = getattr(error, "error_code", "")
        raise TrackingError(
            f"tracking store {hide_credentials(uri)} cannot be used: {reason[:300]}. "
            f"{_remedy(code, reason)}"
        ) from None  # the cause may hold the password


def _remedy(code: str, reason: str) -> str:
    """Return what to do about a store that says no."""
    if "host header" in reason.lower():  # MLflow gives this the code of a lacking permission
        return (
            "The server does not know itself by this name: start it with `mlflow server "
            "--allowed-hosts NAME[:PORT],...`, or call it by a name that it knows."
        )
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    return (
        "Start the server, set --tracking-uri or MLFLOW_TRACKING_URI, or leave both out for "
        f"{DEFAULT_STORE}."
    )


def _parent_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """Return the run that `mlflow run` made for this process."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"the run {run_id} that `mlflow run` made is not in {hide_credentials(uri)} as seen "
            f"from {Path.cwd()}: a project runs in its own folder. Set MLFLOW_TRACKING_URI to an "
            "absolute path (sqlite:////folder/mlflow.db) or a server."
        ) from error


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress_existing():
            client.create_experiment(name, tags={"mlflow.experimentKind": TRAINING})
        found = client.get_experiment_by_name(name)
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment '{name}' was deleted in MLflow; restore it or choose another with "
            "--experiment."
        )
    return str(found.experiment_id)


def _check_disk(uri: str) -> None:
    """Check the disk of local stores; a server's disk is its own matter."""
    if uri.startswith(("http://", "https://")):
        return
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_FREE_BYTES:
        raise TrackingError(
            f"{free / 2**20:.0f} MiB free in {Path.cwd()}; required {LEAST_FREE_BYTES / 2**20:.0f} "
            "MiB for artifacts. Free some space or use a tracking server."
        )


def _check_output(output: Path) -> None:
    """Find before any training that the folder for reports cannot be made."""
    taken = next((place for place in (output, *output.parents) if place.exists()), output)
    if taken.exists() and not taken.is_dir():
        raise TrackingError(
            f"output {output} cannot be a folder: {taken} is a file; choose another with --output."
        )


def _check_sqlite(uri: str, must_exist: bool) -> None:
    """Find at once that a file is no database; MLflow would retry for a minute."""
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if must_exist and uri.startswith("sqlite:///") and not path.exists():
        raise TrackingError(
            f"there is no tracking store {path}; run `adaptive-lora study` first, or set "
            "--tracking-uri."
        )
    if not uri.startswith("sqlite:///") or not path.is_file():
        return
    try:
        # Not mode=ro: what a process left half written when it died must be rolled back first.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as file:
            file.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return  # others are writing: it is one
        raise TrackingError(
            f"tracking store {uri} cannot be used: {path} is no SQLite database ({error})."
        ) from error


def _quieten() -> None:
    """Keep MLflow from asking the network and from filling the terminal."""
    os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")


def _own_retries() -> None:
    """Leave repeating to `retries.py`, which knows what may be repeated."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


@contextmanager
def _short_timeout() -> Iterator[None]:
    """Ask an unreachable server for seconds, not minutes, at the start of a study."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = "8"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
