"""A snapshot on disk: safetensors and JSON in a folder, written atomically.

On reading, each file is first compared with the SHA-256 in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaptive_lora.interruption import replacing

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"


class CorruptCheckpoint(Exception):
    """A checkpoint's files are missing, truncated or changed."""


def write_checkpoint(folder: Path, values: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a new folder; after an error nothing is left.

    Args:
        folder: folder of the checkpoint; an existing one is replaced.
        values: tensors and plain values in nested mappings, lists and tuples.

    Raises:
        OSError: the disk is full, read-only or not available.
    """
    tensors: dict[str, torch.Tensor] = {}
    state = json.dumps(_encoded(values, tensors))
    with replacing(folder) as partial:
        _write_files(partial, state, tensors)
        if folder.exists():
            shutil.rmtree(folder)


def _write_files(folder: Path, state: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (folder / STATE).write_text(state, encoding="utf-8")
    manifest = {"format": FORMAT, "sha256": {name: _sha256(folder / name) for name in (STATE, TENSORS)}}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a folder written by `write_checkpoint`, bit for bit.

    Raises:
        CorruptCheckpoint: a file is missing or differs from what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CorruptCheckpoint(f"format {manifest['format']}, required {FORMAT}")
        if set(manifest["sha256"]) != {STATE, TENSORS}:
            raise CorruptCheckpoint(f"{MANIFEST} names other files than {STATE} and {TENSORS}")
        for name, expected in manifest["sha256"].items():
            found = _sha256(folder / name)
            if found != expected:
                raise CorruptCheckpoint(f"{name} has SHA-256 {found[:16]}, written {expected[:16]}")
        tensors = load_file(folder / TENSORS)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        values: dict[str, Any] = _decoded(state, tensors)
        if not isinstance(values, dict):
            raise CorruptCheckpoint(f"{STATE} holds no mapping")
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError,
    ) as error:  # fmt: skip
        raise CorruptCheckpoint(f"{type(error).__name__}: {error!s:.200}") from error
    return values


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON; containers and tensors become one-key objects that name their type.

    JSON's own objects and lists would lose integer keys and the distinction of tuples.
    """
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": [name, value.device.type]}
    if isinstance(value, Mapping):
        return {"map": [[_encoded(k, tensors), _encoded(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encoded(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value  # Python's JSON supports NaN and infinities, and floats are exact
    raise TypeError(f"{type(value).__name__} cannot be in a checkpoint")


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        name, device = content
        on_gpu = device == "cuda" and torch.cuda.is_available()
        return tensors[name].to("cuda" if on_gpu else "cpu")
    if kind == "map":
        return {_decoded(k, tensors): _decoded(v, tensors) for k, v in content}
    items = [_decoded(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
