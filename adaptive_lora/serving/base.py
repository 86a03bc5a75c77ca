"""Where a base model is on this machine, and whether it is the recorded one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .gguf_file import gguf_in
from .safety import UnsafeFiles, pickled

BASE_VARIABLE = "ADAPTIVE_LORA_BASE"
"""Environment variable: folder or file to use as the base instead of the recorded reference."""
TRUST_VARIABLE = "ADAPTIVE_LORA_TRUST_REMOTE_CODE"
"""Environment variable: `1` runs a base's own Python code where an adapter is served."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
_EARLIER = (
    "config.json", "tokenizer*", "vocab*", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "spiece.model",
)  # fmt: skip
"""Files beside weights and code that all versions have hashed."""
_TEXTS = (
    "chat_template*", "additional_chat_templates/*", "special_tokens_map.json",
    "added_tokens.json", "*.model", "*.spm", "*.tiktoken", "bpe.codes", "tekken.json",
)  # fmt: skip
"""Files of the template and the tokenizer that version 0.1 did not hash."""
_GENERATION = "generation_config.json"
HUB_FILES = (*_OTHERS, "*.safetensors")


class BaseMismatch(RuntimeError):
    """The base on this machine is not the one that the adapter was trained on."""


def content_hash(folder: Path, *, code: bool = False) -> str:
    """Return SHA-256 over all of a base that decides what is trained on it, scored and served.

    These are configuration, weights, tokenizer, chat templates, preparation of inputs, and the
    tokens of generation_config.json that begin and end an answer; its other settings are not used.
    Names and contents enter, times and other files do not; two copies have the same hash. That of a
    GGUF file, which holds all of these, is what `sha256sum` says of it.

    Args:
        folder: of the model, or a GGUF file.
        code: whether its Python files are run, and enter.
    """
    return content_hashes(folder, code=code)[0]


def content_hashes(folder: Path, *, code: bool = False) -> tuple[str, ...]:
    """Return a base's content hash, and after it those that earlier versions gave it.

    A base that was recorded under one of them is the same, as far as that version looked.

    Args:
        folder: of the model, or a GGUF file.
        code: whether its Python files are run, and enter.
    """
    if folder.is_file():
        return (_file_hash(folder),)
    before = _files(folder, (*_WEIGHTS, *_EARLIER, *_code(code)))
    files = {path: _file_hash(path) for path in before | _files(folder, _TEXTS)}
    settings = _answer_tokens(folder)
    if settings is not None:
        files[folder / _GENERATION] = hashlib.sha256(settings).hexdigest()
    hashes = (_joint(folder, files), _joint(folder, {path: files[path] for path in before}))
    return tuple(dict.fromkeys(hashes))


def _files(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return {path for path in found if path.is_file()}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint(folder: Path, files: Mapping[Path, str]) -> str:
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.relative_to(folder).as_posix()}\0{files[path]}\n".encode())
    return total.hexdigest()


def _answer_tokens(folder: Path) -> bytes | None:
    """Return the tokens of generation_config.json that begin or end an answer, as JSON.

    None where they are those of config.json, so that they decide nothing.
    """
    path = folder / _GENERATION
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_bytes())
        settings = json.loads((folder / "config.json").read_bytes())
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
        known = {token for part in parts for token in _tokens(part.get("eos_token_id"))}
        found = {"eos_token_id": sorted(_tokens(stated.get("eos_token_id")) - known)}
        if settings.get("decoder_start_token_id") is None:
            start = _tokens(stated.get("decoder_start_token_id"))
            found["decoder_start_token_id"] = sorted(start)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return path.read_bytes()  # transformers will say what is wrong
    return json.dumps(found).encode() if any(found.values()) else None


def _tokens(value: Any) -> set[int]:
    return set() if value is None else {*value} if isinstance(value, list) else {value}


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
