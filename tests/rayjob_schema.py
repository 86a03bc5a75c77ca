"""Cut the schema of KubeRay's RayJob to the keys of a manifest: `python tests/rayjob_schema.py ray.io_rayjobs.yaml`.

The whole CustomResourceDefinition (`ray-operator/config/crd/bases/ray.io_rayjobs.yaml` in ray-project/kuberay) has
1.4 MB. Every object with named keys refuses others here, as `kubectl apply` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

MANIFEST = Path(__file__).resolve().parents[1] / "entrypoints" / "kubernetes" / "rayjob.yaml"
SCHEMA = Path(__file__).parent / "fixtures" / "rayjob_schema.json"
SOURCE = (
    "RayJob, ray.io/v1, of ray-project/kuberay v1.7.0 (commit 59d663aec13760646da3db9c1cf8cfe883e30b7), Apache-2.0: "
    "cut to the keys that entrypoints/kubernetes/rayjob.yaml has, without descriptions, by tests/rayjob_schema.py."
)


def strict(schema: dict[str, Any], values: list[Any] | None = None) -> dict[str, Any]:
    """Return a schema that refuses unknown keys, without descriptions; with values, cut to the keys that they have."""
    kept = {key: value for key, value in schema.items() if key not in ("description", "default")}
    if "items" in schema:
        inner = None if values is None else [item for value in values for item in value]
        kept["items"] = strict(schema["items"], inner)
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(schema["additionalProperties"])
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    if "properties" in schema:
        kept["properties"] = {
            key: strict(below, None if values is None else [value[key] for value in values if key in value])
            for key, below in schema["properties"].items()
            if values is None or any(key in value for value in values)
        }
    return kept


def of_definition(path: Path) -> dict[str, Any]:
    """Return the schema of version v1 in a CustomResourceDefinition; names in metadata are the API server's own."""
    definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    names = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    schema["properties"]["metadata"] = names
    return schema


if __name__ == "__main__":
    whole = of_definition(Path(sys.argv[1]))
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    cut = {"$comment": SOURCE, **strict(whole, [manifest])}
    SCHEMA.write_text(json.dumps(cut, indent=1) + "\n", encoding="utf-8")
