"""What writes to one run of the tracking store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.async_logging.run_operations import RunOperations
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from adaptive_lora.redaction import hide_credentials, hide_in
from adaptive_lora.tracking.connection import Store

_BATCH = 1000
_PARAMS = 100
_NOTE = 8_000
_GOES_ON = (
    "\n\nThe whole text is the artifact `report/report.md`; `report/report.html` shows it all."
)


class Recorder:
    """Writes to one run in batches; credentials stay out of all texts."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self._pending: list[Metric] = []
        self._sent: list[RunOperations] = []

    def metric(self, key: str, value: float, step: int = 0) -> None:
        """Keep a finite metric for the next `flush`; others have no place on a chart."""
        if value == value and abs(value) != float("inf"):
            self._pending.append(Metric(key, float(value), int(time.time() * 1000), step))

    def send(self) -> None:
        """Send what was kept in the background, in requests of at most 1,000 metrics."""
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), _BATCH):
            chunk = pending[start : start + _BATCH]
            sent = self.store.client.log_batch(self.run_id, metrics=chunk, synchronous=False)
            if sent is not None:
                self._sent.append(sent)

    def flush(self) -> None:
        """Send what was kept and wait until everything has arrived."""
        self.send()
        sent, self._sent = self._sent, []
        for operation in sent:
            operation.wait()

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; the names carry a prefix and never meet those of `mlflow run`."""
        items = [Param(key, hide_credentials(str(value))) for key, value in values.items()]
        for start in range(0, len(items), _PARAMS):
            self.store.client.log_batch(self.run_id, params=items[start : start + _PARAMS])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        items = [RunTag(key, hide_credentials(value)) for key, value in values.items()]
        self.store.client.log_batch(self.run_id, tags=items)

    def json(self, name: str, values: Any) -> None:
        """Log a JSON artifact."""
        text = json.dumps(hide_in(values), indent=1, allow_nan=False)
        self.store.client.log_text(self.run_id, text, name)

    def text(self, name: str, text: str) -> None:
        """Log a text artifact."""
        self.store.client.log_text(self.run_id, hide_credentials(text), name)

    def files(self, folder: Path, path: str) -> None:
        """Log a folder of artifacts."""
        self.store.client.log_artifacts(self.run_id, str(folder), path)

    def data(self, name: str, digest: str, source: str, rows: int) -> None:
        """Log the data set as an input, by digest; its rows stay where they are."""
        dataset = Dataset(
            name=hide_credentials(name)[:500],
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": hide_credentials(source)}),
            profile=json.dumps({"num_rows": rows}),
        )
        context = InputTag(key="mlflow.data.context", value="training")
        inputs = [DatasetInput(dataset=dataset, tags=[context])]
        self.store.client.log_inputs(self.run_id, datasets=inputs)

    def describe(self, markdown: str) -> None:
        """Set the run's description, shown on its page in the tracking UI.

        MLflow takes 8,000 characters; a longer text ends at a paragraph and says where it goes on.
        """
        if len(markdown) > _NOTE:
            markdown = markdown[: markdown.rindex("\n\n", 0, _NOTE - len(_GOES_ON))] + _GOES_ON
        self.tags({MLFLOW_RUN_NOTE: markdown})


class TrialRun(Recorder):
    """The run of one trial."""
