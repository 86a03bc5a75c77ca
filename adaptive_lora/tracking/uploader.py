"""Upload of a journal's records to the store. All operations are idempotent.

Idempotent in MLflow 3.17 itself are metrics of runs and models (the primary key has key, step, value
and time, and the time is the journal's), parameters, tags, the end of a run, inputs and artifacts
(overwritten). Creating a run, creating a logged model and linking the two are not. Where such a request was not
answered, or may have been made by another process (`Journal.unsure`), these objects are searched for
before they are made again, and once more when the run ends, because a request that timed out may still be
executed later. Each search looks through all runs of a store, so that others do without.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS

from adaptive_lora.interruption import remove_partial, replacing
from adaptive_lora.tracking.journal import CorruptJournal, Journal

log = logging.getLogger(__name__)

RUN_KEY = "adaptive_lora.run_key"
"""Tag with the key of a run, used before the store assigned an id."""
MODEL_TAG = "adapter_model_uri"
MODEL_NAME = "adapter"
"""Type of a run's logged model, and its name in earlier versions; name of its folder where there are none."""
_BATCH, _PARAMS = 1000, 100
"""Maximum number of metrics, and of parameters, per MLflow request."""
_MLMODEL = "MLmodel"


class Uploader:
    """Sends the records of journals to one store; repeated sending has no further effect."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self.client, self.uri = client, uri
        self._said_old = False

    def next(self, journal: Journal) -> None:
        """Send the next record of a journal, or a batch of metrics, and mark it as delivered.

        Raises:
            MlflowException, OSError: it did not arrive, or it is unknown whether it did.
            ValueError: the journal or an answer is corrupt.
        """
        records = list(islice(journal.records(), _BATCH))
        if records[0].op != "metric":
            SENDERS[records[0].op](self, journal, records[0].values)
            journal.acknowledge(records[0])
            return
        batch = list(takewhile(lambda record: record.op == "metric", records))
        wanted = [r.values for r in batch if (r.values["k"], r.values["s"]) not in journal.known]
        if wanted:
            metrics = [_metric(values, journal.facts.get("model_id")) for values in wanted]
            self.client.log_batch(journal.facts["run_id"], metrics=metrics)
        journal.acknowledge(batch[-1])

    def run(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Find the run or make it."""
        if values.get("run_id"):
            journal.learn(run_id=values["run_id"])
        elif "run_id" not in journal.facts:
            search = journal.unsure
            with journal.making():
                run = make_run(self.client, values, search=search)
            journal.learn(run_id=run.info.run_id, artifact_uri=run.info.artifact_uri)

    def params(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Log parameters."""
        items = [Param(key, value) for key, value in values["values"].items()]
        for start in range(0, len(items), _PARAMS):
            self.client.log_batch(journal.facts["run_id"], params=items[start : start + _PARAMS])

    def tags(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Set tags."""
        items = [RunTag(key, value) for key, value in values["values"].items()]
        for start in range(0, len(items), _PARAMS):
            self.client.log_batch(journal.facts["run_id"], tags=items[start : start + _PARAMS])

    def data(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Log a data set as an input."""
        context = InputTag(key=MLFLOW_DATASET_CONTEXT, value=values.get("context", "training"))
        inputs = [DatasetInput(dataset=Dataset(**values["dataset"]), tags=[context])]
        self.client.log_inputs(journal.facts["run_id"], datasets=inputs)

    def artifacts(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Upload files beneath the run's artifacts."""
        if "artifact_uri" not in journal.facts:
            self._find_artifacts(journal)
        self._upload(journal, journal.folder / values["held"], journal.facts["artifact_uri"], values["path"])

    def table(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Name an artifact among the run's tables, by the tag that `mlflow.log_table` sets."""
        run = self.client.get_run(journal.facts["run_id"])
        tables = list_of_tag(run.data.tags, MLFLOW_LOGGED_ARTIFACTS)
        if (entry := {"path": values["name"], "type": "table"}) not in tables:
            self.client.set_tag(run.info.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))

    def model(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Make the run's logged model, or find the one it has, and upload its files.

        A server older than MLflow 3 has no logged models; there the files are artifacts of the run.
        """
        facts, run_id = journal.facts, journal.facts["run_id"]
        if "model_uri" not in facts:
            journal.learn(**self._place_of_model(journal, values))
        folder = journal.folder / values["held"]
        _enter_ids(folder, facts)
        self._upload(journal, folder, facts["model_uri"], None)
        if "model_id" not in facts:
            self.client.set_tag(run_id, MODEL_TAG, f"runs:/{run_id}/{MODEL_NAME}")
            return
        journal.step("ready", lambda: self.client.finalize_logged_model(facts["model_id"], "READY"))
        journal.step("output", lambda: self._link(journal))
        self.client.set_tag(run_id, MODEL_TAG, f"models:/{facts['model_id']}")

    def _place_of_model(self, journal: Journal, values: Mapping[str, Any]) -> dict[str, str]:
        """Return id and artifact location of a run's logged model, or the location alone where there are none."""
        run, known = self.client.get_run(journal.facts["run_id"]), journal.facts.get("model_id")
        try:
            made = sorted(self._models(run), key=lambda model: model.model_id != known) if journal.unsure else []
            if made:
                model = made[0]
            else:
                with journal.making():
                    model = self._make_model(run, values)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            if not self._said_old:
                self._said_old = True
                log.warning(
                    "The tracking server is older than MLflow 3: logged models are left out, and adapters are "
                    "artifacts of their runs."
                )
            return {"model_uri": f"{run.info.artifact_uri}/{MODEL_NAME}"}
        return {"model_id": model.model_id, "model_uri": model.artifact_location}

    def status(self, journal: Journal, values: Mapping[str, Any]) -> None:
        """Set a run's status; a final one also removes duplicates made by late requests."""
        run_id, status, client = journal.facts["run_id"], values["status"], self.client
        if status == "RUNNING":
            client.update_run(run_id, status=status)
            return
        journal.step("ended", lambda: client.set_terminated(run_id, status, values["time"]))
        if not journal.unsure:
            return
        run = client.get_run(run_id)
        if RUN_KEY in run.data.tags:
            for other in runs_of_key(client, run.info.experiment_id, run.data.tags[RUN_KEY]):
                if other.info.run_id != run_id:
                    client.delete_run(other.info.run_id)
        if "model_id" in journal.facts:
            for model in self._models(run):
                if model.model_id != journal.facts["model_id"]:
                    client.delete_logged_model(model.model_id)

    def _find_artifacts(self, journal: Journal) -> None:
        """Record the run's artifact location, from the store, not from the journal."""
        journal.learn(artifact_uri=self.client.get_run(journal.facts["run_id"]).info.artifact_uri)

    def _upload(self, journal: Journal, folder: Path, uri: str, where: str | None) -> None:
        """Upload file by file, so that an error repeats one file and not all."""
        place = get_artifact_repository(uri, tracking_uri=self.uri)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.is_symlink():  # copies have no links: someone put it there to be sent
                raise CorruptJournal(f"{path} is a link")
            name = path.relative_to(folder)
            inside = [where] if where else []
            inside += [] if name.parent == Path() else [name.parent.as_posix()]
            send = partial(place.log_artifact, str(path), "/".join(inside) or None)
            journal.step(f"file {name}", send)

    def _link(self, journal: Journal) -> None:
        """Link the model to the run as an output, unless it is linked."""
        run_id, model_id = journal.facts["run_id"], journal.facts["model_id"]
        if journal.unsure:
            outputs = self.client.get_run(run_id).outputs
            if model_id in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
                return
        with journal.making():
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])

    def _models(self, run: Run) -> list[LoggedModel]:
        """Return the logged adapters of a run, oldest first."""
        query = f"source_run_id = '{run.info.run_id}'"
        found = self.client.search_logged_models([run.info.experiment_id], query)
        own = [model for model in found if MODEL_NAME in (model.name, model.model_type)]
        return sorted(own, key=lambda model: (model.creation_timestamp, model.model_id))

    def _make_model(self, run: Run, values: Mapping[str, Any]) -> LoggedModel:
        return self.client.create_logged_model(
            run.info.experiment_id,
            name=values.get("name", MODEL_NAME),
            source_run_id=run.info.run_id,
            tags=values.get("tags"),
            params=values.get("params"),
            model_type=MODEL_NAME,
        )


SENDERS: Mapping[str, Callable[[Uploader, Journal, Mapping[str, Any]], None]] = {
    "run": Uploader.run,
    "params": Uploader.params,
    "tags": Uploader.tags,
    "data": Uploader.data,
    "artifacts": Uploader.artifacts,
    "table": Uploader.table,
    "model": Uploader.model,
    "status": Uploader.status,
}


def make_run(client: MlflowClient, new: Mapping[str, Any], *, search: bool = True) -> Run:
    """Make a run, or find the one made by an earlier request.

    Args:
        client: client of the store.
        new: `key`, by which it is found again, `experiment_id`, `name`, `tags` and `time` (start, in
            milliseconds).
        search: possibility of an earlier request.
    """
    found = runs_of_key(client, new["experiment_id"], new["key"]) if search else ()
    if found:
        return found[0]
    return client.create_run(
        new["experiment_id"], start_time=new["time"], tags={**new["tags"], RUN_KEY: new["key"]}, run_name=new["name"]
    )


def runs_of_key(client: MlflowClient, experiment_id: str, key: str) -> Sequence[Run]:
    """Return the runs made for one key; more than one only after a late request."""
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'")
    return sorted(found, key=lambda run: run.info.run_id)


def list_of_tag(tags: Mapping[str, str], key: str) -> list[Any]:
    """Return the list that one of MLflow's tags holds as JSON; empty where it is missing or no list."""
    try:
        values = json.loads(tags.get(key, "[]"))
    except ValueError:  # somebody changed it
        return []
    return values if isinstance(values, list) else []


def model_name(name: str) -> str:
    """Return a name without the characters that MLflow forbids in those of logged models."""
    return re.sub(r"""[/:.%"']""", "_", name)


def _metric(values: Mapping[str, Any], model_id: str | None) -> Metric:
    """Return a recorded metric: one of the run's model too, if it was recorded as such and there is a model."""
    point = (values["k"], values["v"], values["t"], values["s"])
    if model_id is None or "m" not in values:
        return Metric(*point)
    name, digest = values.get("d", (None, None))
    return Metric(*point, model_id=model_id, dataset_name=name, dataset_digest=digest)


def _enter_ids(folder: Path, facts: Mapping[str, str]) -> None:
    """Write the ids of model and run into a model's folder."""
    remove_partial(folder, _MLMODEL)  # it would be uploaded
    text = (folder / _MLMODEL).read_text(encoding="utf-8")
    description = Model.from_dict(yaml.safe_load(text))  # `load` decodes %20 in a path
    description.run_id = facts["run_id"]
    if "model_id" in facts:
        description.model_id = description.model_uuid = facts["model_id"]
    description.artifact_path = facts["model_uri"]
    with replacing(folder / _MLMODEL) as draft:
        description.save(str(draft))
