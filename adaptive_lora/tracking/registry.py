"""Adapters as MLflow models and registered versions, and the champion's alias.

A model is written as "models from code": nothing is pickled. `mlflow.transformers` is not used: with a
local base it saves adapter-wrapped layer names, and the reloaded model has random weights (mlflow
issue 23761).
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from adaptive_lora.errors import TrackingError
from adaptive_lora.serving import CAUSAL, LISTS, RECORD, TASKS, TaskSpec
from adaptive_lora.serving.other_types import offered
from adaptive_lora.serving.safety import CONFIG, read_json
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.retries import outlast_or_say, suppress_existing
from adaptive_lora.tracking.uploader import MODEL_TAG as MODEL_TAG
from adaptive_lora.tracking.uploader import list_of_tag

_PACKAGE = Path(__file__).resolve().parent.parent
SERVED = _PACKAGE / "tracking" / "served_adapter.py"
SERVING = _PACKAGE / "serving"
SERVED_AS = "adapter_serving"
"""Package name of the serving code saved with every model, which no other package has."""
_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "pandas")
CHAMPION = "champion"
_ADDRESS = re.compile(r"models:/(?!\.+[/@])[^/@\s]+([/@][\w.-]+)?|runs:/\w+(/(?!\.)[\w.-]+)+")
_LOADER = "mlflow.pyfunc.loaders.code_model"
_RUN = (".py", ".pyc", ".pkl", ".pickle", ".so", ".pyd", ".pth")
"""Suffixes of files that Python could run."""
_SHOWN = 3
"""Maximum number of files in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredAdapter:
    """A version in the model registry."""

    name: str
    version: str
    model_uri: str


def save_served(folder: Path, place: Path, metadata: Mapping[str, Any]) -> None:
    """Write an adapter folder as a pyfunc model; its run is entered at delivery."""
    task = TASKS[read_json(folder / RECORD).get("task", CAUSAL)["name"]]
    with warnings.catch_warnings():
        # MLflow recommends an input example; making one would load the base again.
        warnings.filterwarnings("ignore", "(?s).*input example was not provided", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(place),
            mlflow_model=Model(metadata=dict(metadata)),
            python_model=str(SERVED),
            code_paths=[str(SERVING)],
            artifacts={"adapter": folder.absolute().as_uri()},  # MLflow decodes %20 in a path
            signature=_signature(task),
            # without local build labels such as `+cpu`, which are not on the package index
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in requirements_of(folder)],
        )
    (place / "code" / SERVING.name).rename(place / "code" / SERVED_AS)
    for cache in list(place.rglob("__pycache__")):
        shutil.rmtree(cache)


def _signature(task: TaskSpec) -> ModelSignature:
    columns: list[Any] = [
        ColSpec(AnyType() if name in LISTS else "string", name, required=False) for name in task.columns
    ]
    limit = ParamSchema([ParamSpec("max_new_tokens", "integer", 64)])
    return ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([ColSpec("double" if task.numbers else "string")]),
        params=limit if task.generates else None,  # type: ignore[arg-type]
    )


def requirements_of(folder: Path) -> tuple[str, ...]:
    """Return the packages needed to serve an adapter folder, with further ones for a quantised base."""
    record = read_json(folder / RECORD)
    base = record.get("base", {})
    quantised = "quantisation" in record or str(base.get("stored_as") or "").startswith("bitsandbytes")
    heard = record.get("task", CAUSAL)["name"] == "speech_to_text"
    further = {"bitsandbytes": quantised, "gguf": base.get("source") == "gguf", "soundfile": heard, "scipy": heard}
    kind = read_json(folder / CONFIG).get("peft_type") if (folder / CONFIG).is_file() else None
    if (other := offered(str(kind))) is not None and other.dist is not None:
        further[other.dist.name] = True
    return (*_REQUIREMENTS, *(name for name, needed in further.items() if needed))


def adapter_folder(model_uri: str) -> Path:
    """Download the adapter folder of a logged or registered model; return its local path.

    Raises:
        TrackingError: the model does not exist, or has no adapter.
    """
    folder = _fetched(model_uri)
    found = next((path for path in sorted(folder.rglob(RECORD)) if path.is_file()), None)
    if found is None:
        raise TrackingError(f"model {model_uri} holds no adapter of adaptive-lora.")
    return found.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterHistory:
    """Records of an adapter in the tracking store."""

    params: Mapping[str, str]
    """Settings of the trial that trained it."""
    tags: Mapping[str, str]
    """Tags of that trial."""
    metrics: Mapping[str, float]
    """Metrics of that trial, each at its last step."""
    decision: Mapping[str, str]
    """Tags of the registered version: the verdict, and the proof of reloading; empty for other addresses."""


def adapter_history(store: Store, model_uri: str) -> AdapterHistory:
    """Return what the store has recorded of an adapter.

    Raises:
        TrackingError: there is no such model, or the run that trained it is gone.
    """
    try:
        return outlast_or_say(lambda: _history(store.client, model_uri))
    except MlflowException as error:
        raise TrackingError(f"the records of model {model_uri} cannot be read: {error}") from error


def _history(client: MlflowClient, model_uri: str) -> AdapterHistory:
    kind, _, rest = model_uri.partition(":/")
    name, at, alias = rest.partition("@")
    decision: Mapping[str, str] = {}
    if kind == "runs":
        run_id = rest.split("/")[0]
    elif at or "/" in rest:
        name, number = (name, "") if at else rest.split("/", 1)
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
        run_id, decision = str(found.run_id), dict(found.tags)
    else:
        run_id = str(client.get_logged_model(rest).source_run_id)
    run = client.get_run(run_id)
    return AdapterHistory(params=run.data.params, tags=run.data.tags, metrics=run.data.metrics, decision=decision)


def _fetched(model_uri: str) -> Path:
    if not _ADDRESS.fullmatch(model_uri):
        raise TrackingError(
            f"'{model_uri:.200}' names no model: required models:/NAME@ALIAS, "
            "models:/NAME/VERSION, models:/m-ID or runs:/RUN_ID/PATH."
        )
    try:
        return Path(outlast_or_say(lambda: mlflow.artifacts.download_artifacts(model_uri)))
    except Exception as error:  # each type of artifact store has its own errors
        raise TrackingError(f"model {model_uri} cannot be fetched: {error}") from error


def require_own_code(model_uri: str) -> None:
    """Check that the code run in serving a model is this version's, byte for byte.

    `mlflow.pyfunc.load_model` and `mlflow models serve` run any Python files in a model's folder, and
    install the packages of its requirements.

    Raises:
        TrackingError: there is other code, a pickle, or another requirement.
    """
    folder = _fetched(model_uri)
    if compiled := list(folder.rglob("__pycache__")):
        # Loading from a local store leaves bytecode in it, which would be run instead of its source, so
        # it is removed; bytecode in a second download was put there by someone.
        for place in compiled:
            shutil.rmtree(place)
        folder = _fetched(model_uri)
    own = {
        Path(SERVED.name): SERVED,
        **{Path("code") / SERVED_AS / path.relative_to(SERVING): path for path in SERVING.rglob("*.py")},
    }
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in _RUN}
    strange = found ^ set(own)
    strange |= {name for name in found & set(own) if (folder / name).read_bytes() != own[name].read_bytes()}
    strange |= {Path(name) for name, right in _descriptions(folder).items() if not right}
    if strange:
        first, more = sorted(map(str, strange))[:_SHOWN], len(strange) - _SHOWN
        raise TrackingError(
            f"model {model_uri} would be served by code that is not this version's "
            f"({', '.join(first)}{f' and {more} more files' if more > 0 else ''}): another version of adaptive-lora "
            "logged it, or it was changed. Register it with the version that its study names in the tag "
            "provenance.adaptive_lora, or run its trial again with this one in a new study, --study NAME"
        )


def _descriptions(folder: Path) -> dict[str, bool]:
    """Return file -> whether it has the serving settings written by `save_served`."""

    def names(lines: Iterable[object]) -> set[str]:
        return {str(line).partition("==")[0] for line in lines}

    described, conda, python = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for name in ("MLmodel", "conda.yaml", "python_env.yaml")
    )
    served = described["flavors"].get("python_function", {})
    (nested,) = [item["pip"] for item in conda["dependencies"] if isinstance(item, dict)]
    outer = [item for item in conda["dependencies"] if isinstance(item, str)]
    records = sorted(folder.rglob(RECORD))
    packages = set(requirements_of(records[0].parent)) if records else set()
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    return {
        "MLmodel": set(described["flavors"]) == {"python_function"}
        and served.get("loader_module") == _LOADER
        and served.get("code") == "code"
        and Path(served.get("model_code_path", "")).name == SERVED.name,
        "requirements.txt": names(lines) == packages,
        "conda.yaml": names(nested) == packages
        and {re.split("[<=>]", item)[0] for item in outer} <= {"python", "pip"}
        and conda.get("channels") == ["conda-forge"],
        "python_env.yaml": python["dependencies"] == ["-r requirements.txt"]
        and names(python["build_dependencies"]) <= {"pip", "setuptools", "wheel"},
    }


def register(store: Store, name: str, run: Run) -> RegisteredAdapter:
    """Register the adapter of a run as a version, or find its existing one."""
    number = outlast_or_say(lambda: _version(store, name, run))
    return RegisteredAdapter(name=name, version=number, model_uri=run.data.tags[MODEL_TAG])


def _version(store: Store, name: str, run: Run) -> str:
    """Find a run's version or make it; may be repeated after a lost answer."""
    client, model_uri, model_id = store.client, run.data.tags[MODEL_TAG], None
    if model_uri.startswith("models:/"):
        model_id = model_uri.rsplit("/", 1)[-1]
    else:  # of a server without logged models: `runs:/RUN_ID/FOLDER`
        model_uri = f"{run.info.artifact_uri}/{model_uri.rsplit('/', 1)[-1]}"
    try:
        client.get_registered_model(name)
    except MlflowException:
        with suppress_existing():
            client.create_registered_model(name, description="Adapters that adaptive-lora studies found best.")
    versions = client.search_model_versions(f"name='{name}'")
    number = next((str(found.version) for found in versions if found.run_id == run.info.run_id), None)
    if number is None:
        number = str(client.create_model_version(name, model_uri, run.info.run_id, model_id=model_id).version)
    if model_id is not None and not store.uri.startswith(("http://", "https://")):  # a server does so itself
        _name_version(client, model_id, {"name": name, "version": number})
    return number


def _name_version(client: MlflowClient, model_id: str, version: Mapping[str, str]) -> None:
    """Name a version in its logged model's tag, by which the tracking UI links the two."""
    versions = list_of_tag(client.get_logged_model(model_id).tags, MLFLOW_MODEL_VERSIONS)
    if version not in versions:
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, version])})


def promote(store: Store, adapter: RegisteredAdapter, decision: Mapping[str, str], description: str) -> None:
    """Make a version the champion, with the decision as its tags and its description."""
    store.client.update_model_version(adapter.name, adapter.version, description)
    for key, value in decision.items():
        store.client.set_model_version_tag(adapter.name, adapter.version, key, value)
    store.client.set_registered_model_alias(adapter.name, CHAMPION, adapter.version)
