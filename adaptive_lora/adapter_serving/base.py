"""Where a base model is on this machine, and whether it is the recorded one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

BASE_VARIABLE = "ADAPTIVE_LORA_BASE"
"""Environment variable: folder to use as the base instead of the recorded reference."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_FILES = (*_OTHERS, "*.safetensors")


class BaseMismatch(RuntimeError):
    """The base on this machine is not the one that the adapter was trained on."""


def content_hash(folder: Path) -> str:
    """Return SHA-256 over configuration, tokenizer and weights of a model folder.

    Names and contents enter, times and other files do not; two copies have the same hash.
    """
    total = hashlib.sha256()
    names = {
        path
        for pattern in (*_WEIGHTS, "config.json", "tokenizer*", "vocab*", "merges.txt")
        for path in folder.glob(pattern)
        if path.is_file()
    }
    for path in sorted(names):
        with path.open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{inner}\n".encode())
    return total.hexdigest()


def base_folder(source: str, name: str, revision: str | None = None) -> Path:
    """Return the folder of a base model, fetching a hub model on first use.

    Args:
        source: `embedded` (inside the adaptive_lora package), `folder` or `hub`.
        name: path of a folder or id on the hub.
        revision: hub revision.

    Raises:
        FileNotFoundError: the folder or package is not there.
    """
    override = os.environ.get(BASE_VARIABLE)
    if override:
        return Path(override)
    if source == "embedded":
        spec = importlib.util.find_spec("adaptive_lora")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the embedded base comes with the package adaptive_lora, which is not installed; "
                f"install it or set {BASE_VARIABLE} to a copy of its embedded/base folder."
            )
        return Path(spec.submodule_search_locations[0]) / "embedded" / "base"
    if source == "folder":
        if not Path(name).is_dir():
            raise FileNotFoundError(f"base folder {name} not found; set {BASE_VARIABLE} to a copy.")
        return Path(name)
    return _hub_folder(name, revision)


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    if not any(folder.glob("*.safetensors")):
        # Older repositories hold pickled weights only; transformers reads them with weights_only.
        patterns = [*HUB_FILES, "pytorch_model*.bin"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    return folder
