"""The recorder of one run: writes to local disk at once, and to the store in the background."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from adaptive_lora.errors import TrackingError
from adaptive_lora.redaction import hide_credentials, hide_in
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.journal import Journal, new_key
from adaptive_lora.tracking.registry import save_served
from adaptive_lora.tracking.uploader import MODEL_NAME, model_name

_NOTE, _DATA_NAME = 8_000, 500
"""Most characters that MLflow accepts in a run's description, and in the name of a data set."""
_GOES_ON = "\n\nThe whole text is the artifact `report/report.md`; `report/report.html` shows it all."


class DataId(NamedTuple):
    """Name and digest of a data set, which identify it in MLflow."""

    name: str
    digest: str
    """Digest of its content, of at most 36 characters."""


class Recorder:
    """Records one run. No method waits for the store, except `flush` for a given time.

    All records go into the run's journal first (`journal.py`), without credentials, and are sent in
    order by the store's outbox. A run that is begun while the store is unreachable gets its id later.

    An interrupted run is continued by `resume`: existing records are not made twice, from any
    checkpoint that training continues from.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        """Record to an existing run of the store; see `begin` for a new one."""
        self.store = store
        # `ends`: this process ends the run; `once`: it records each metric once a step.
        self._header: dict[str, Any] = {"run_id": run_id, "store": store.shown_uri}
        self._journal: Journal | None = None
        self._ended: Journal | None = None
        self._has: set[tuple[str, int]] = set()
        self._params: set[str] = set()

    @classmethod
    def begin(cls, store: Store, name: str, tags: Mapping[str, str]) -> Self:
        """Begin a new run, also if the store does not answer."""
        run = cls(store, "")
        run._header = new_run(store, name, tags)
        _ = run._open
        return run

    @classmethod
    def resume(cls, store: Store, run_id: str) -> Self:
        """Continue an interrupted run; its status becomes RUNNING.

        Metrics that the store has for a step are not recorded again, so that a trial may continue from
        any checkpoint. Its interrupted journal must be delivered before (`sync.deliver_left`, called
        by `StudyRun.open`).

        Raises:
            TrackingError: the store does not answer.
        """
        run = cls(store, run_id)
        run._header |= {"ends": True, "once": True}
        found = store.client.get_run(run_id)
        run._params = set(found.data.params)
        for key in found.data.metrics:
            run._has |= {(key, m.step) for m in store.client.get_metric_history(run_id, key)}
        run._append("status", {"status": "RUNNING", "time": _now()})
        return run

    @property
    def run_id(self) -> str:
        """The run's id in the store.

        Raises:
            TrackingError: it has none yet, because the store has not answered since the run began.
        """
        for journal in (self._journal, self._ended):
            if journal is not None and "run_id" in journal.facts:
                return journal.facts["run_id"]
        if not self._header.get("run_id"):
            raise TrackingError(
                f"run {self._header['key']} has not reached the tracking store yet "
                f"({self.store.outbox.away or 'it was begun just now'})."
            )
        return str(self._header["run_id"])

    def metric(
        self, key: str, value: float, step: int = 0, *, of_model: bool = False, data: DataId | None = None
    ) -> None:
        """Record a metric; non-finite values are ignored, because charts cannot show them.

        Args:
            key: name of the metric.
            value: its value.
            step: optimiser step.
            of_model: whether it is one of the run's model too, which has been recorded before.
            data: data set that the model was measured on, or None.
        """
        if math.isfinite(value) and (key, step) not in self._has:
            model = {"m": True} if of_model else {}
            measured = {} if data is None else {"d": [data.name[:_DATA_NAME], data.digest]}
            self._append("metric", {"k": key, "v": float(value), "s": step, "t": _now(), **model, **measured})

    def flush(self, patience: float = 0.0) -> bool:
        """Send records, and wait for `patience` seconds without progress; return whether the store has all of them."""
        written = [journal for journal in (self._ended, self._journal) if journal is not None]
        return all([self.store.outbox.drain(patience, journal) for journal in written])

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, whose names have a prefix and differ from those of `mlflow run`."""
        texts = {key: str(value) for key, value in values.items() if key not in self._params}
        if texts:
            self._append("params", {"values": texts})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._append("tags", {"values": dict(values)})

    def json(self, name: str, values: Any) -> None:
        """Log a JSON artifact."""
        self.text(name, json.dumps(hide_in(values), indent=1, allow_nan=False))

    def text(self, name: str, text: str) -> None:
        """Log a text artifact."""
        place = PurePosixPath(name)
        with TemporaryDirectory() as folder:
            (Path(folder) / place.name).write_text(hide_credentials(text), encoding="utf-8")
            self.files(Path(folder), "" if place.parent == PurePosixPath() else str(place.parent))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Log a table as a JSON artifact that the tracking UI shows as one; it replaces an earlier table."""
        self.json(name, {"columns": list(columns), "data": [list(row) for row in rows]})
        self._append("table", {"name": name})

    def files(self, folder: Path, path: str) -> None:
        """Log the files of a folder as artifacts beneath `path`."""
        self._append("artifacts", {"path": path or None, "held": self._open.keep(folder)})

    def model(
        self,
        folder: Path,
        metadata: Mapping[str, Any],
        *,
        name: str = MODEL_NAME,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log an adapter folder as the run's model; a run has one.

        Args:
            folder: folder of the adapter.
            metadata: facts that are written into the model's `MLmodel` file.
            name: name in the tracking UI's list of models; characters that MLflow forbids are replaced.
            params: settings by which the UI compares models.
            tags: tags by which models are found.
        """
        texts = {key: str(value) for key, value in (params or {}).items()}
        with TemporaryDirectory() as place:
            save_served(folder, Path(place) / "model", metadata)
            held = self._open.keep(Path(place) / "model")
        self._append("model", {"held": held, "name": model_name(name), "params": texts, "tags": dict(tags or {})})

    def data(self, name: str, digest: str, source: str, rows: int, *, context: str = "training") -> None:
        """Log a data set as an input by digest, without its rows; `context` is the use that is made of it."""
        dataset = {
            "name": name[:_DATA_NAME],
            "digest": digest,
            "source_type": "local",
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"num_rows": rows}),
        }
        self._append("data", {"dataset": dataset, "context": context})

    def describe(self, markdown: str) -> None:
        """Set the run's description, shown on its page in the tracking UI.

        MLflow accepts 8,000 characters; a longer text is cut at a paragraph and refers to the report.
        """
        if len(markdown) > _NOTE:
            markdown = markdown[: markdown.rindex("\n\n", 0, _NOTE - len(_GOES_ON))] + _GOES_ON
        self.tags({MLFLOW_RUN_NOTE: markdown})

    def end(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        self._append("status", {"status": status, "time": _now()})
        self.leave()

    def leave(self) -> None:
        """Stop recording; the run may belong to another process now."""
        self._open.finish()
        self._ended, self._journal = self._journal, None
        self.store.outbox.notify()

    @property
    def _open(self) -> Journal:
        """The run's journal, created with the first record."""
        if self._journal is None:
            self._journal = self.store.outbox.create(self._header)
        return self._journal

    def _append(self, op: str, values: Mapping[str, Any]) -> None:
        self._open.append(op, values if op == "metric" else hide_in(values))


def new_run(store: Store, name: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the values needed to make a run, now or later (`uploader.make_run`)."""
    return {
        "store": store.shown_uri,
        "experiment_id": store.experiment_id,
        "name": hide_credentials(name),
        # MLflow adds its own tags, including the git remote, whose URI may contain a token.
        "tags": hide_in(resolve_tags(dict(tags))),
        "time": _now(),
        "key": new_key(),
        "ends": True,
        "once": True,
    }


def _now() -> int:
    """Return the time in milliseconds."""
    return time.time_ns() // 1_000_000
