"""Where a base model is on this machine, and whether it is the recorded one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from .gguf_file import gguf_in
from .vetting import UnsafeFiles, pickled

BASE_VARIABLE = "ADAPTIVE_LORA_BASE"
"""Environment variable: folder or file to use as the base instead of the recorded reference."""
TRUST_VARIABLE = "ADAPTIVE_LORA_TRUST_REMOTE_CODE"
"""Environment variable: `1` runs a base's own Python code where an adapter is served."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
_PREPARATION = ("preprocessor_config.json", "processor_config.json", "spiece.model")
"""How images and texts become inputs, where that does not stand in the tokenizer's own files."""
HUB_FILES = (*_OTHERS, "*.safetensors")


class BaseMismatch(RuntimeError):
    """The base on this machine is not the one that the adapter was trained on."""


def content_hash(folder: Path, *, code: bool = False) -> str:
    """Return SHA-256 over configuration, preparation of inputs and weights of a model.

    Names and contents enter, times and other files do not; two copies have the same hash. That of a
    GGUF file, which holds all three, is what `sha256sum` says of it.

    Args:
        folder: of the model, or a GGUF file.
        code: whether its Python files are run, and enter.
    """
    if folder.is_file():
        with folder.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    others = ("config.json", "tokenizer*", "vocab*", "merges.txt", *_PREPARATION)
    names = {
        path
        for pattern in (*_WEIGHTS, *others, *_code(code))
        for path in folder.glob(pattern)
        if path.is_file()
    }
    for path in sorted(names):
        with path.open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{inner}\n".encode())
    return total.hexdigest()


def _code(run: bool) -> tuple[str, ...]:
    return ("*.py",) if run else ()


def base_folder(source: str, name: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Return the folder or GGUF file of a base model, fetching a hub model on first use.

    Args:
        source: `embedded` (inside the adaptive_lora package), `folder`, `gguf` or `hub`.
        name: path of a folder or file, or id on the hub.
        revision: hub revision.
        code: fetch its Python files too.

    Raises:
        FileNotFoundError: the folder, file or package is not there.
        UnsafeFiles: the hub has pickled weights only, or several GGUF files could be meant.
    """
    override = os.environ.get(BASE_VARIABLE)
    if override:
        return gguf_in(Path(override)) or Path(override)
    if source == "embedded":
        spec = importlib.util.find_spec("adaptive_lora")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the embedded base comes with the package adaptive_lora, which is not installed; "
                f"install it or set {BASE_VARIABLE} to a copy of its embedded/base folder."
            )
        return Path(spec.submodule_search_locations[0]) / "embedded" / "base"
    if source in ("folder", "gguf"):
        if not (Path(name).is_dir() if source == "folder" else Path(name).is_file()):
            kind = "folder" if source == "folder" else "file"
            raise FileNotFoundError(f"base {kind} {name} not found; set {BASE_VARIABLE} to a copy.")
        return Path(name)
    return _hub_folder(name, revision, code)


def _hub_folder(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *_code(code)]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    if not any(folder.glob("*.safetensors")):
        raise UnsafeFiles(pickled(name))
    return folder
