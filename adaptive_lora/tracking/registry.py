"""Adapters as MLflow models, proven before they get a version, and the champion's alias.

Not `mlflow.transformers.log_model`: with a local base it saves adapter-wrapped layer names, and the
reloaded model has random weights (mlflow issue 23761).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from adaptive_lora.adapter_serving import RECORD
from adaptive_lora.errors import TrackingError
from adaptive_lora.tracking.connection import Store

CHAMPION = "champion"
MODEL_TAG = "adapter_model_uri"
_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "pandas")
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredAdapter:
    """A version in the model registry."""

    name: str
    version: str
    model_uri: str


def log_adapter(store: Store, run_id: str, folder: Path, metadata: Mapping[str, Any]) -> str:
    """Log an adapter folder as a pyfunc model of a run; return its `models:/m-...` URI."""
    with warnings.catch_warnings():
        # MLflow would like an input example; making one would load the base once more.
        warnings.filterwarnings("ignore", "(?s).*input example was not provided", UserWarning)
        info = Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            name="adapter",
            run_id=run_id,
            python_model=str(_PACKAGE / "tracking" / "served_adapter.py"),
            code_paths=[str(_PACKAGE / "adapter_serving")],
            artifacts={"adapter": str(folder)},
            signature=_signature(),
            pip_requirements=[_pinned(name) for name in _REQUIREMENTS],
            metadata=dict(metadata),
        )
    store.client.set_tag(run_id, MODEL_TAG, info.model_uri)
    return str(info.model_uri)


def load_logged_adapter(model_uri: str) -> tuple[Any, Any, dict[str, Any]]:
    """Load a logged or registered adapter as serving does: (model, tokenizer, record)."""
    served = mlflow.pyfunc.load_model(model_uri).unwrap_python_model()
    loaded: tuple[Any, Any, dict[str, Any]] = served.loaded
    return loaded


def adapter_folder(model_uri: str) -> Path:
    """Fetch the adapter folder of a logged or registered model; return its local path.

    Raises:
        TrackingError: no such model, or one without an adapter.
    """
    try:
        folder = Path(mlflow.artifacts.download_artifacts(model_uri))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"model {model_uri} cannot be fetched: {error}") from error
    found = next(folder.rglob(RECORD), None)
    if found is None:
        raise TrackingError(f"model {model_uri} holds no adapter of adaptive-lora.")
    return found.parent


def register(store: Store, name: str, run: Run) -> RegisteredAdapter:
    """Give the adapter of a run a version in the registry, or find the one it has."""
    model_uri = run.data.tags[MODEL_TAG]
    try:
        store.client.get_registered_model(name)
    except MlflowException:
        store.client.create_registered_model(
            name, description="Adapters that adaptive-lora studies found best."
        )
    for found in store.client.search_model_versions(f"name='{name}'"):
        if found.run_id == run.info.run_id:
            return RegisteredAdapter(name=name, version=str(found.version), model_uri=model_uri)
    made = store.client.create_model_version(
        name, source=model_uri, run_id=run.info.run_id, model_id=model_uri.rsplit("/", 1)[-1]
    )
    return RegisteredAdapter(name=name, version=str(made.version), model_uri=model_uri)


def promote(
    store: Store, adapter: RegisteredAdapter, decision: Mapping[str, str], description: str
) -> None:
    """Make a version the champion, with the decision as its tags and its description."""
    store.client.update_model_version(adapter.name, adapter.version, description)
    for key, value in decision.items():
        store.client.set_model_version_tag(adapter.name, adapter.version, key, value)
    store.client.set_registered_model_alias(adapter.name, CHAMPION, adapter.version)


def _pinned(name: str) -> str:
    """Return `name==version`; builds such as `2.13.0+cpu` are not on the package index."""
    return f"{name}=={version(name).partition('+')[0]}"


def _signature() -> ModelSignature:
    names = ("prompt", "instruction", "input")
    columns: list[Any] = [ColSpec("string", name, required=False) for name in names]
    return ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "integer", 64)]),
    )
