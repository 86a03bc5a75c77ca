"""A reachable tracking store: its client, and the outbox of records to deliver."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from adaptive_lora.errors import Undelivered
from adaptive_lora.redaction import hide_credentials
from adaptive_lora.tracking.outbox import Outbox
from adaptive_lora.tracking.retries import outlast_or_say

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
