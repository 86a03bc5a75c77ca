"""A reachable tracking store: reading from it, and what still has to reach it."""

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
"""Seconds without progress after which the end of a command gives up on a store."""
HASTE = 3.0
"""The same where the command was stopped or failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A reachable tracking store."""

    client: MlflowClient
    """For reading and the registry. Its calls outlast an outage of two minutes, so none belongs
    between training steps: runs are written through a `Recorder`, which never waits."""
    uri: str
    """As MLflow takes it; may hold credentials, use `shown_uri` for people."""
    experiment_id: str
    experiment: str
    """Name of the experiment for people, with who chose it where the option did not."""
    parent_run_id: str | None
    """The run that `mlflow run` made for this process, or None."""
    outbox: Outbox
    """What was recorded and is on its way. `spool.away` says why nothing is taken just now."""

    @property
    def shown_uri(self) -> str:
        """The URI without user and password."""
        return hide_credentials(self.uri)

    @property
    def shown_place(self) -> str:
        """Where results go, for people: the store and the experiment."""
        return hide_credentials(f"{self.uri}, experiment {self.experiment}")

    def read_json(self, run_id: str, name: str) -> Any:
        """Read a JSON artifact of a run.

        Raises:
            OSError, ValueError: missing or damaged.
        """
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise OSError(str(error)) from error
        return self.read_run_json(run, name)

    def read_run_json(self, run: Run, name: str) -> Any:
        """Read a JSON artifact of a run at hand, which spares asking the store where it is.

        Raises:
            OSError, ValueError: missing or damaged.
        """
        place = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri)
        local = isinstance(place, LocalArtifactRepository)  # then no copy is made
        with TemporaryDirectory() as folder:
            words = (name,) if local else (name, folder)
            try:
                path = outlast_or_say(lambda: place.download_artifacts(*words))
            except (MlflowException, requests.RequestException) as error:
                raise OSError(str(error)) from error
            try:
                return json.loads(Path(path).read_text(encoding="utf-8"))
            except RecursionError as error:
                raise ValueError(f"{name} is nested too deeply") from error

    def settle(self, then: str = "") -> None:
        """Wait until the store has everything that was recorded in this process.

        Args:
            then: what to do after the delivery, for the message.

        Raises:
            Undelivered: it does not take something; that stays on local disk.
        """
        self.outbox.retry_refused()
        if not self.outbox.drain(PATIENCE):
            raise Undelivered(f"{self.left()}{then}")

    def close(self, *, hasty: bool = False) -> None:
        """Deliver what can be delivered and let go of the rest, which stays on local disk.

        Args:
            hasty: wait for seconds only: the command was stopped or failed.
        """
        self.outbox.drain(HASTE if hasty else PATIENCE)
        self.outbox.close()

    def left(self) -> str:
        """Say what the store did not take, why, and which command sends it."""
        journals = self.outbox.undelivered()
        reasons = {j.facts.get("refused") or self.outbox.away or "too slow" for j in journals}
        return (
            f"the tracking store {self.shown_uri} did not take the records of {len(journals)} "
            f"{'run' if len(journals) == 1 else 'runs'} ({'; '.join(sorted(reasons))}). They are "
            f"kept in {self.outbox.folder}; send them with `adaptive-lora sync "
            f"{self.outbox.folder.parent}`."
        )
