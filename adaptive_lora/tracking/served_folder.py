"""An adapter folder as an MLflow model on disk ("models from code"; nothing is pickled).

Not `mlflow.transformers`: with a local base it saves adapter-wrapped layer names, and the reloaded
model has random weights (mlflow issue 23761).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

from adaptive_lora.serving import CAUSAL, LISTS, RECORD, TASKS, TaskSpec
from adaptive_lora.serving.safety import read_json

_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "pandas")
PACKAGE = Path(__file__).resolve().parent.parent
SERVED = PACKAGE / "tracking" / "served_adapter.py"
SERVING = PACKAGE / "serving"
SERVED_AS = "adapter_serving"
"""Package name of the serving code saved with every model, which no other package has."""


def save_served(folder: Path, place: Path, metadata: Mapping[str, Any]) -> None:
    """Write an adapter folder as a pyfunc model; its run is entered at delivery."""
    with warnings.catch_warnings():
        # MLflow recommends an input example; making one would load the base again.
        warnings.filterwarnings("ignore", "(?s).*input example was not provided", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(place),
            mlflow_model=Model(metadata=dict(metadata)),
            python_model=str(SERVED),
            code_paths=[str(SERVING)],
            artifacts={"adapter": folder.absolute().as_uri()},  # MLflow decodes %20 in a path
            signature=_signature(_task_of(folder)),
            pip_requirements=[_pinned(name) for name in requirements_of(folder)],
        )
    (place / "code" / SERVING.name).rename(place / "code" / SERVED_AS)
    for cache in place.rglob("__pycache__"):
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()


def requirements_of(folder: Path) -> tuple[str, ...]:
    """Return the packages needed to serve an adapter folder, with further ones for a quantised base."""
    record = read_json(folder / RECORD)
    return (
        *_REQUIREMENTS,
        *(["bitsandbytes"] if _needs_bitsandbytes(record) else []),
        *(["gguf"] if record.get("base", {}).get("source") == "gguf" else []),
    )


def _needs_bitsandbytes(record: Mapping[str, Any]) -> bool:
    """Return whether loading the base needs bitsandbytes."""
    stored = str(record.get("base", {}).get("stored_as") or "")
    return "quantisation" in record or stored.startswith("bitsandbytes")


def _pinned(name: str) -> str:
    """Return `name==version`, without local build labels such as `+cpu`, which are not on the package index."""
    return f"{name}=={version(name).partition('+')[0]}"


def _task_of(folder: Path) -> TaskSpec:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return TASKS[record.get("task", CAUSAL)["name"]]


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
