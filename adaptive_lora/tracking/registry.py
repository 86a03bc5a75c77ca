"""Adapters as MLflow models, proven before they get a version, and the champion's alias.

Not `mlflow.transformers.log_model`: with a local base it saves adapter-wrapped layer names, and the
reloaded model has random weights (mlflow issue 23761).
"""

from __future__ import annotations

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
_LOADER = "mlflow.pyfunc.loaders.code_model"
_PACKAGE = Path(__file__).resolve().parent.parent
_SERVED = _PACKAGE / "tracking" / "served_adapter.py"
_SERVING = _PACKAGE / "adapter_serving"
"""Code that travels with every model."""
_RUN = (".py", ".pyc", ".pkl", ".pickle", ".so", ".pyd", ".pth")
"""What Python could run."""


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
            python_model=str(_SERVED),
            code_paths=[str(_SERVING)],
            artifacts={"adapter": str(folder)},
            signature=_signature(),
            pip_requirements=[_pinned(name) for name in _REQUIREMENTS],
            metadata=dict(metadata),
        )
    store.client.set_tag(run_id, MODEL_TAG, info.model_uri)
    return str(info.model_uri)


def adapter_folder(model_uri: str) -> Path:
    """Fetch the adapter folder of a logged or registered model; return its local path.

    Raises:
        TrackingError: no such model, or one without an adapter.
    """
    folder = _fetched(model_uri)
    found = next((path for path in sorted(folder.rglob(RECORD)) if path.is_file()), None)
    if found is None:
        raise TrackingError(f"model {model_uri} holds no adapter of adaptive-lora.")
    return found.parent


def _fetched(model_uri: str) -> Path:
    try:
        return Path(mlflow.artifacts.download_artifacts(model_uri))
    except Exception as error:  # each kind of artifact store has its own errors
        raise TrackingError(f"model {model_uri} cannot be fetched: {error}") from error


def require_own_code(model_uri: str) -> None:
    """Check that what serving a model runs is this version's code, byte for byte.

    `mlflow.pyfunc.load_model` and `mlflow models serve` run the Python files that lie beside a
    model, whoever put them there, and install what its requirements name.

    Raises:
        TrackingError: other code, a pickle, or other packages.
    """
    folder = _fetched(model_uri)
    if compiled := list(folder.rglob("__pycache__")):
        # Loading from a local store leaves bytecode in it. It would be run instead of its source,
        # so it goes; what comes back with a second fetch was put there by somebody.
        for place in compiled:
            shutil.rmtree(place)
        folder = _fetched(model_uri)
    own = {
        Path(_SERVED.name): _SERVED,
        **{Path("code") / path.relative_to(_PACKAGE): path for path in _SERVING.rglob("*.py")},
    }
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in _RUN}
    strange = found ^ set(own)
    strange |= {name for name in found & set(own) if not _same(folder / name, own[name])}
    strange |= {Path(name) for name, right in _surroundings(folder).items() if not right}
    if strange:
        raise TrackingError(
            f"model {model_uri} would be served by code that is not this version's "
            f"({', '.join(sorted(map(str, strange)))}); run its trial again to log it anew."
        )


def _surroundings(folder: Path) -> dict[str, bool]:
    """Return whether each file that says how a model is served says what `log_adapter` wrote."""

    def names(lines: Iterable[object]) -> set[str]:
        return {str(line).partition("==")[0] for line in lines}

    described, conda, python = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for name in ("MLmodel", "conda.yaml", "python_env.yaml")
    )
    served = described["flavors"].get("python_function", {})
    (nested,) = [item["pip"] for item in conda["dependencies"] if isinstance(item, dict)]
    outer = [item for item in conda["dependencies"] if isinstance(item, str)]
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    return {
        "MLmodel": set(described["flavors"]) == {"python_function"}
        and served.get("loader_module") == _LOADER
        and served.get("code") == "code"
        and Path(served.get("model_code_path", "")).name == _SERVED.name,
        "requirements.txt": names(lines) == set(_REQUIREMENTS),
        "conda.yaml": names(nested) == set(_REQUIREMENTS)
        and {re.split("[<=>]", item)[0] for item in outer} <= {"python", "pip"}
        and conda.get("channels") == ["conda-forge"],
        "python_env.yaml": python["dependencies"] == ["-r requirements.txt"]
        and names(python["build_dependencies"]) <= {"pip", "setuptools", "wheel"},
    }


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


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
