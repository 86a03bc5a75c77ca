"""The path of a base model on this machine, and its content hash."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .gguf_file import gguf_in
from .safety import UnsafeFiles, pickled

BASE_VARIABLE = "ADAPTIVE_LORA_BASE"
"""Name of the environment variable with a folder or file to use as the base instead of the recorded one."""
TRUST_VARIABLE = "ADAPTIVE_LORA_TRUST_REMOTE_CODE"
"""Name of the environment variable that allows a base's own Python code in serving, if it is `1`."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
_EARLIER = (
    "config.json", "tokenizer*", "vocab*", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "spiece.model",
)  # fmt: skip
"""Files other than weights and code that are hashed in all versions."""
_TEXTS = (
    "chat_template*", "additional_chat_templates/*", "special_tokens_map.json",
    "added_tokens.json", "*.model", "*.spm", "*.tiktoken", "bpe.codes", "tekken.json",
)  # fmt: skip
"""Template and tokenizer files that version 0.1 did not hash."""
_GENERATION = "generation_config.json"
HUB_FILES = (*_OTHERS, "*.safetensors")


class BaseMismatch(RuntimeError):
    """The base on this machine is not the one that the adapter was trained on."""


def content_hash(folder: Path, *, code: bool = False) -> str:
    """Return SHA-256 over everything in a base that affects training, scoring and serving.

    This includes configuration, weights, tokenizer, chat templates, input processors, and the start
    and end tokens of generation_config.json, whose other settings are not used. Names and contents
    of files enter, times and other files do not, so that copies have equal hashes. The hash of a GGUF
    file, which has all of these, is that of `sha256sum`.

    Args:
        folder: folder of the model, or a GGUF file.
        code: whether its Python files are run, and enter the hash.
    """
    return content_hashes(folder, code=code)[0]


def content_hashes(folder: Path, *, code: bool = False) -> tuple[str, ...]:
    """Return a base's content hash, followed by those of earlier versions.

    A base recorded with one of them is equal in everything that the earlier version hashed.

    Args:
        folder: folder of the model, or a GGUF file.
        code: whether its Python files are run, and enter the hash.
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
    """Return the start and end tokens of generation_config.json as JSON.

    None where they are equal to those of config.json and so have no effect.
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
        return path.read_bytes()  # transformers will report the problem
    return json.dumps(found).encode() if any(found.values()) else None


def _tokens(value: Any) -> set[int]:
    return set() if value is None else {*value} if isinstance(value, list) else {value}


def _code(run: bool) -> tuple[str, ...]:
    return ("*.py",) if run else ()


def base_folder(
    source: str, name: str, revision: str | None = None, *, code: bool = False, weights: bool = True
) -> Path:
    """Return the folder or GGUF file of a base model; a hub model is downloaded on first use.

    Args:
        source: `embedded` (inside the adaptive_lora package), `folder`, `gguf` or `hub`.
        name: path of a folder or file, or id on the hub.
        revision: hub revision.
        code: whether to download its Python files too.
        weights: whether to download more than config.json and its Python files.

    Raises:
        FileNotFoundError: the folder, file or package does not exist.
        UnsafeFiles: the hub has pickled weights only, or several GGUF files could be meant.
    """
    override = os.environ.get(BASE_VARIABLE)
    if override:
        return gguf_in(Path(override)) or Path(override)
    if source == "embedded":
        spec = importlib.util.find_spec("adaptive_lora")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the embedded base is part of the package adaptive_lora, which is not installed; "
                f"install it or set {BASE_VARIABLE} to a copy of its embedded/base folder."
            )
        return Path(spec.submodule_search_locations[0]) / "embedded" / "base"
    if source in ("folder", "gguf"):
        if not (Path(name).is_dir() if source == "folder" else Path(name).is_file()):
            kind = "folder" if source == "folder" else "file"
            raise FileNotFoundError(f"base {kind} {name} not found; set {BASE_VARIABLE} to a copy.")
        return Path(name)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*(HUB_FILES if weights else ["config.json"]), *_code(code)]
    away = hub_away(name, revision=revision)
    known: dict[str, Any] = {} if away is None else {"local_files_only": True}  # which spares repeated requests
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **known))
    except LocalEntryNotFoundError as error:
        if away is None:
            raise
        raise FileNotFoundError(f"{away}, and the hub's cache does not have it, or not all of it") from error
    if weights and not any(folder.glob("*.safetensors")):
        if away is not None:
            raise FileNotFoundError(
                f"its files in the hub's cache, {folder}, have no weights (*.safetensors), and {away}"
            )
        raise UnsafeFiles(pickled(name))
    if away is not None and not constants.HF_HUB_OFFLINE:
        _say_cached(name, folder.name, away)
    return folder


def hub_away(name: str, *, revision: str | None = None, repo_type: str = "model") -> str | None:
    """Return why the hub cannot be asked about a repository, in words; None where it answers, whatever that is."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        HfApi().repo_info(name, repo_type=repo_type, revision=revision)
    except HFValidationError:
        return None
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"the hub answers {status}" if status >= 500 else None
    except (HTTPError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        return f"the hub is not reached ({str(error) or type(error).__name__})"
    return None


@cache
def _say_cached(name: str, commit: str, away: str) -> None:
    """Tell once that a base is read from the hub's cache, where a newer commit would go unnoticed."""
    logging.getLogger(__name__).warning("%s; base %s is read from the hub's cache, commit %s", away, name, commit[:12])
