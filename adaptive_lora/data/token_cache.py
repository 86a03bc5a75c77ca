"""Disk cache of a data set's tokens, keyed by a hash of everything that determines them.

The folder is ADAPTIVE_LORA_CACHE, else `adaptive-lora` in XDG_CACHE_HOME, else in `~/.cache`; an
empty ADAPTIVE_LORA_CACHE turns the cache off. Several processes may share it: files are written
atomically, and two processes write equal content under one name. Where the disk is full or
read-only, texts are tokenised each time.

The cache of `datasets` is not used: its `map` names files by a 64-bit hash of pickled objects, does
not verify what it reads, and stores nothing for data sets made in memory, as these are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from adaptive_lora import __version__
from adaptive_lora.data.examples import Example
from adaptive_lora.data.token_files import SUFFIX, CorruptTokens, read_rows, write_rows
from adaptive_lora.interruption import PARTIAL

CACHE_VARIABLE = "ADAPTIVE_LORA_CACHE"
"""Name of the environment variable with the cache folder; empty: no cache."""
FOLDER = "tokens"
"""Name of the folder of tokens inside the cache folder."""
MOST_BYTES = 2 * 2**30
"""Maximum size of all files together in bytes; beyond it, the least recently used are removed."""
FORMAT = 4
"""Version of the tokenisation code; to be raised when tasks tokenise the same examples differently."""
_ABANDONED = 24 * 3600.0
"""Age in seconds from which an unfinished file is taken to be left by a dead process."""


class Tokenised(Protocol):
    """A prepared example whose preparation is tokenisation alone."""

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return name -> integers from tokenisation; the names are equal for all examples of a set."""

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Restore a prepared example from the example and its `numbers`."""


T = TypeVar("T", bound=Tokenised)


def cached_tokens(
    examples: Sequence[Example],
    kind: type[T],
    make: Callable[[Sequence[Example]], Sequence[T]],
    made_from: Mapping[str, Any],
) -> tuple[T, ...]:
    """Return the prepared examples, from the cache if they were prepared before.

    Args:
        examples: examples of the data set, at least one.
        kind: type of the prepared examples.
        make: function that tokenises; its errors are raised each time.
        made_from: everything else that determines the result: settings and `tokenizer_digest`, JSON-ready.
    """
    folder = token_folder()
    if folder is None:
        return tuple(make(examples))
    key = _key(examples, {**made_from, "kind": kind.__name__})
    path = folder / f"{key}{SUFFIX}"
    log = logging.getLogger(__name__)
    try:
        rows = read_rows(path, key, len(examples))
        kept = tuple(kind.of(e, row) for e, row in zip(examples, rows, strict=True))
        with suppress(OSError):
            os.utime(path)  # mark as recently used
        return kept
    except FileNotFoundError:
        pass
    except CorruptTokens as corruption:
        log.warning("tokens in %s are recomputed: the file is corrupt: %s", path, corruption)
    except OSError as error:
        log.warning("tokens are recomputed: %s cannot be read: %s", path, error)
    made = tuple(make(examples))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_rows(path, key, [item.numbers() for item in made])
        _tidy(folder, path)
    except OSError as error:
        log.warning("tokens cannot be cached in %s: %s", folder, error)
    return made


def token_folder() -> Path | None:
    """Return the folder of the token cache, or None where the user turned it off."""
    own = os.environ.get(CACHE_VARIABLE)
    if own is not None:
        return Path(own).expanduser() / FOLDER if own.strip() else None
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "adaptive-lora" / FOLDER


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return SHA-256 over a tokenizer's rules; None where they are written in Python.

    The rules are vocabulary, merges, added tokens, normalisation and special tokens around a text.
    The path it was loaded from does not enter, so copies have the same digest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # settings left by the last call
        rules.pop(state, None)
    names = (
        "chat_template", "special_tokens_map", "eos_token_id", "pad_token_id", "model_max_length",
        "truncation_side", "model_input_names", "split_special_tokens",
    )  # fmt: skip
    content = {
        "class": type(tokenizer).__qualname__,
        "rules": rules,
        **{name: getattr(tokenizer, name, None) for name in names},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def asks_for_the_time(processor: Any) -> bool:
    """Return whether a chat template writes the current time, so that tokens change over time.

    Templates use `strftime_now` for it.
    """
    inner = getattr(processor, "tokenizer", None)
    templates = (getattr(each, "chat_template", None) for each in (processor, inner))
    return any("strftime_now" in str(template) for template in templates)


def _key(examples: Sequence[Example], made_from: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    versions = [__version__, *(version(name) for name in ("transformers", "tokenizers"))]
    total.update(json.dumps([FORMAT, versions, made_from], sort_keys=True).encode())
    for e in examples:  # JSON, so that the boundary between texts is unambiguous
        texts = (e.prompt, e.response, e.second, e.question, e.messages, e.chat_text)
        total.update(json.dumps(texts).encode() + b"\n")
    return total.hexdigest()


def _tidy(folder: Path, newest: Path) -> None:
    """Remove the least recently used files, and abandoned unfinished ones."""
    found = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it at this moment
            about = path.stat()
            if PARTIAL in path.name and time.time() - about.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX and path != newest:
                found.append((about.st_mtime, about.st_size, path))
    room = MOST_BYTES - newest.stat().st_size
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink(missing_ok=True)
