"""The tracking store: it is found, checked and prepared before a study starts, and settled at its end."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from urllib.parse import quote

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from adaptive_lora.config import TrackingConfig
from adaptive_lora.config.store_place import (
    ExperimentChoice,
    chosen_experiment,
    require_database,
    sqlite_file,
    store_uri,
    unusable,
)
from adaptive_lora.errors import TrackingError, Undelivered
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.tracking.create import DATABASE_ERRORS, State, artifact_root, ensure_store, require_current, state_of
from adaptive_lora.tracking.outbox import FOLDER, Outbox
from adaptive_lora.tracking.retries import STORE_ERRORS, PatientClient, outlast, outlast_or_say, suppress_existing
from adaptive_lora.tracking.uploader import Uploader

TRAINING = "custom_model_development"
"""Kind of experiment that the tracking UI shows as model training rather than agent evaluation."""
_START = 4.0
"""Seconds within which a store must answer at the start of a command."""
LEAST_FREE_BYTES = 200 * 2**20
"""Minimum free disk space for artifacts, in bytes, to start a study."""
_DEFAULTS = {
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow, where the user has not set them, that keep it from the network and the terminal."""
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
PATIENCE = 60.0
"""Seconds without progress after which a finished command stops waiting for a store."""
_HASTE = 3.0
"""Seconds without progress after which any command stops waiting for a store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A reachable tracking store."""

    client: MlflowClient
    """Client for reading and the registry. Its calls are retried for two minutes, so they must not be
    between training steps: runs are recorded by a `Recorder`, which never waits."""
    uri: str
    """URI in MLflow's form; may contain credentials, so use `shown_uri` for display."""
    experiment_id: str
    experiment: str
    """Name of the experiment for display, with its source if it was not chosen by option."""
    parent_run_id: str | None
    """Id of the run that `mlflow run` created for this process, or None."""
    outbox: Outbox
    """Outbox of the records to deliver. `outbox.away` is the reason why the store is unreachable."""

    @property
    def shown_uri(self) -> str:
        """The URI without user and password."""
        return hide_credentials(self.uri)

    @property
    def shown_place(self) -> str:
        """Store and experiment of the results, for display."""
        return hide_credentials(f"{self.uri}, experiment {self.experiment}")

    def read_json(self, run: Run | str, name: str) -> Any:
        """Read a JSON artifact of a run, or of the run with an id, which takes a request more.

        Raises:
            OSError, ValueError: the artifact is missing or corrupt.
        """
        try:
            found = self.client.get_run(run) if isinstance(run, str) else run
            place = get_artifact_repository(found.info.artifact_uri, tracking_uri=self.uri)
            with TemporaryDirectory() as folder:
                # a local store makes no copy where it is given no folder
                words = (name,) if isinstance(place, LocalArtifactRepository) else (name, folder)
                path = outlast_or_say(lambda: place.download_artifacts(*words))
                return json.loads(Path(path).read_text(encoding="utf-8"))
        except (MlflowException, requests.RequestException) as error:
            raise OSError(str(error)) from error
        except RecursionError as error:
            raise ValueError(f"{name} is nested too deeply") from error

    def settle(self, then: str = "") -> None:
        """Wait until the store has all records of this process.

        Args:
            then: advice for after the delivery, for the message.

        Raises:
            Undelivered: the store does not accept some records, which stay on local disk.
        """
        self.outbox.retry_refused()
        if self.outbox.drain(PATIENCE):
            return
        journals, folder = self.outbox.undelivered(), self.outbox.folder
        reasons = {j.facts.get("refused") or self.outbox.away or "too slow" for j in journals}
        raise Undelivered(
            f"the tracking store {self.shown_uri} did not take the records of {len(journals)} "
            f"{'run' if len(journals) == 1 else 'runs'} ({'; '.join(sorted(reasons))}). They are "
            f"kept in {folder}; send them with `adaptive-lora sync {folder.parent}`.{then}"
        )

    def close(self) -> None:
        """Deliver as many records as possible within seconds; the others stay on local disk."""
        self.outbox.drain(_HASTE)
        self.outbox.close()


def connect(config: TrackingConfig, *, must_exist: bool = False) -> Store:
    """Connect to the tracking store, and find or make the experiment.

    Under `mlflow run` its run and experiment are used, because setting another experiment is an error
    in MLflow (mlflow issue 2735).

    Args:
        config: tracking settings.
        must_exist: whether a missing store is an error, for commands that only read.

    Raises:
        TrackingError: the store is unreachable or not supported by MLflow, or the disk is full.
    """
    uri, choice = store_uri(config), chosen_experiment(config)
    _check_disk(uri)
    _check_output(Path(config.output))
    parent = os.environ.get("MLFLOW_RUN_ID")
    with opened(uri, must_exist) as client:
        # MLflow also writes them to the environment, where the next study of this process would read them as the
        # user's choice.
        with _restored("MLFLOW_TRACKING_URI"), _restored("MLFLOW_REGISTRY_URI"):
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
        if parent is not None:
            run = outlast(lambda: _parent_run(client, uri, parent), _START)
            experiment = outlast(lambda: client.get_experiment(run.info.experiment_id), _START)
            choice = ExperimentChoice(name=experiment.name, by="`mlflow run`")
        else:
            experiment = outlast(lambda: _experiment(client, uri, choice), _START)
    return Store(
        client=cast(MlflowClient, PatientClient(client)),
        uri=uri,
        experiment_id=str(experiment.experiment_id),
        experiment=f"'{experiment.name}'{f' ({choice.by})' if choice.by else ''}",
        parent_run_id=parent,
        outbox=Outbox(Path(config.output).absolute() / FOLDER, Uploader(client, uri)),
    )


def reach(uri: str) -> Uploader:
    """Connect to a store for delivery, without creating anything in it.

    Raises:
        TrackingError: the store is unreachable.
    """
    with opened(uri) as client:
        outlast(lambda: client.search_experiments(max_results=1), _START)
    return Uploader(client, uri)


def probe(config: TrackingConfig) -> str:
    """Make one real call to the store, without creating anything; return the result as text.

    Raises:
        TrackingError: the store is unreachable.
    """
    uri = store_uri(config)
    file = sqlite_file(uri)
    _prepare()
    if file is not None:
        _check_file(uri)
        if state_of(uri) is not State.WHOLE:
            return f"{file} will be made by the first study"
    with _reaching(uri):
        experiments = MlflowClient(tracking_uri=uri).search_experiments(max_results=10)
    return f"{hide_credentials(uri)} answers ({len(experiments)} or more experiments)"


@contextmanager
def opened(uri: str, must_exist: bool = False) -> Iterator[MlflowClient]:
    """Open a store, made complete if it is missing, inside the block; its errors become one clear error."""
    _prepare()
    # `retries` repeats only safe calls, in place of MLflow's own retries.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault(_TIMEOUT, "30")
    _check_file(uri, must_exist)
    with _reaching(uri), _first_contact(uri):
        ensure_store(uri)
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    """Wait for seconds, not minutes, inside the block, and convert all errors of an unusable store into one."""
    try:
        with _restored(_TIMEOUT):
            os.environ[_TIMEOUT] = "8"
            yield
    except (*STORE_ERRORS, *DATABASE_ERRORS, ImportError) as error:
        reason = next(iter(hide_credentials(str(error)).splitlines()), type(error).__name__)
        code = getattr(error, "error_code", "")
        raise unusable(uri, reason, code) from None  # the cause may contain the password


@contextmanager
def unchanged_mlflow(place: TrackingConfig | None = None) -> Iterator[None]:
    """Give MLflow's tracking and registry URI their values back after the block.

    Args:
        place: store that is used inside. Where the program itself uses another, its `mlflow.set_experiment`, which
            MLflow writes into the environment, does not choose the experiment.
    """
    with _restored("MLFLOW_TRACKING_URI"), _restored("MLFLOW_REGISTRY_URI"), _restored("MLFLOW_EXPERIMENT_ID"):
        tracking = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        registry = mlflow.get_registry_uri()
        if tracking == os.environ.get("MLFLOW_TRACKING_URI"):
            tracking = None  # MLflow reads it from there
        if registry in (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_REGISTRY_URI")):
            registry = ""  # MLflow follows the tracking URI, or reads it from there
        set_here = getattr(mlflow.tracking.fluent, "_active_experiment_id", None) or ""
        own = store_uri(TrackingConfig(tracking_uri=mlflow.get_tracking_uri()))
        if place is not None and store_uri(place) != own and os.environ.get("MLFLOW_EXPERIMENT_ID") == set_here:
            del os.environ["MLFLOW_EXPERIMENT_ID"]
        try:
            yield
        finally:
            mlflow.set_tracking_uri(cast(str, tracking))  # it takes None, too
            mlflow.set_registry_uri(registry)


@contextmanager
def _restored(name: str) -> Iterator[None]:
    """Give an environment variable its value back after the block."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _first_contact(uri: str) -> AbstractContextManager[object]:
    """Let only one process of this machine at a time connect to a database server.

    MLflow creates the tables of an empty database without checking whether others do so too.
    """
    if not re.match(r"(postgresql|mysql|mssql)\b", uri):
        return nullcontext()
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"adaptive-lora-{name}.lock", mode=0o666)


@contextmanager
def _missing(message: str) -> Iterator[None]:
    """Convert MLflow's error on a missing or invalid id inside the block."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(message) from error


def _parent_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """Return the run that `mlflow run` created for this process."""
    with _missing(
        f"the run {run_id} that `mlflow run` made is not in {hide_credentials(uri)} as seen "
        f"from {Path.cwd()}: a project runs in its own folder. Set MLFLOW_TRACKING_URI to an "
        "absolute path (sqlite:////folder/mlflow.db) or a server."
    ):
        return client.get_run(run_id)


def _experiment(client: MlflowClient, uri: str, choice: ExperimentChoice) -> Experiment:
    """Find the chosen experiment, or make it if it was chosen by name."""
    if choice.name is None:
        assert choice.id is not None
        with _missing(
            f"there is no experiment with the id {choice.id:.40} that MLFLOW_EXPERIMENT_ID names; set "
            "it to one that exists, or choose one by name with --experiment."
        ):
            found: Experiment | None = client.get_experiment(choice.id)
    else:
        found = client.get_experiment_by_name(choice.name)
        if found is None and choice.id is None:
            with suppress_existing():
                tags = {"mlflow.experimentKind": TRAINING}
                client.create_experiment(choice.name, _artifact_location(uri, choice.name), tags)
            found = client.get_experiment_by_name(choice.name)
        if choice.id is not None and (found is None or str(found.experiment_id) != choice.id):
            raise TrackingError(
                f"MLFLOW_EXPERIMENT_NAME is '{choice.name}' and MLFLOW_EXPERIMENT_ID is "
                f"'{choice.id:.40}', which is not that experiment's; set one of the two."
            )
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment '{found.name}' was deleted in MLflow; restore it or choose another with --experiment."
        )
    return found


def _artifact_location(uri: str, name: str) -> str | None:
    """Return the artifact location of a new experiment; None: MLflow's default."""
    root = None if uri.startswith(("http://", "https://")) else artifact_root()
    return None if root is None else f"{root}/{quote(name, safe='')}"


def _check_disk(uri: str) -> None:
    """Check the free disk space of local stores; a server's is not checked."""
    if uri.startswith(("http://", "https://")):
        return
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_FREE_BYTES:
        raise TrackingError(
            f"{free / 2**20:.0f} MiB free in {Path.cwd()}; required {LEAST_FREE_BYTES / 2**20:.0f} "
            "MiB for artifacts. Free some space or use a tracking server."
        )


def _check_output(output: Path) -> None:
    """Check before any training that the folder for reports can be made."""
    taken = next((place for place in (output, *output.parents) if place.exists()), output)
    if taken.exists() and not taken.is_dir():
        raise TrackingError(f"output {output} cannot be a folder: {taken} is a file; choose another with --output.")


def _check_file(uri: str, must_exist: bool = False) -> None:
    """Check the file of a SQLite store."""
    if (file := sqlite_file(uri)) is not None:
        require_database(uri, file, must_exist=must_exist)
        require_current(uri)


def _prepare() -> None:
    """Keep MLflow from using the network and from filling the terminal."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")
