"""Tokens of a data set, made once and kept on disk under a hash of all that they are made from.

The folder is ADAPTIVE_LORA_CACHE, else `adaptive-lora` in XDG_CACHE_HOME, else in `~/.cache`; an
empty ADAPTIVE_LORA_CACHE keeps nothing. Several processes may share it: a file appears whole, and
two that make the same one write the same. Where the disk is full or read-only, tokens are made
each time.

The cache of `datasets` does not serve: its `map` names files by a 64-bit hash of pickled objects,
does not check what it reads, and keeps nothing of sets that were made in memory, as ours are.
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
from adaptive_lora.data.token_files import PARTIAL, SUFFIX, CorruptTokens, read_rows, write_rows

CACHE_VARIABLE = "ADAPTIVE_LORA_CACHE"
"""Environment variable: folder of what can be made again; empty: nothing is kept."""
FOLDER = "tokens"
"""Inside it."""
MOST_BYTES = 2 * 2**30
"""Of all files together; beyond it those go that were not used for the longest time."""
FORMAT = 4
"""To be raised with every change of what tasks make of the same examples."""
_ABANDONED = 24 * 3600.0
"""Age in seconds from which an unfinished file is one of a process that died."""


class Tokenised(Protocol):
    """What a task prepares of an example, where tokenising is all of the work."""

    def numbers(self) -> Mapping[str, Sequence[int]]:
        """Return what tokenising gave, by name; the same names for every example of a set."""

    @classmethod
    def of(cls, example: Example, numbers: Mapping[str, Sequence[int]]) -> Self:
        """Return it from an example and its `numbers`."""


T = TypeVar("T", bound=Tokenised)


def cached_tokens(
    examples: Sequence[Example],
    kind: type[T],
    make: Callable[[Sequence[Example]], Sequence[T]],
    made_from: Mapping[str, Any],
) -> tuple[T, ...]:
    """Return what `make` makes of examples, from disk where it was made before.

    Args:
        examples: of the data set, at least one.
        kind: what an example becomes.
        make: tokenises; errors of its own are raised each time.
        made_from: what decides beside the examples: settings and `tokenizer_digest`, JSON-ready.
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
            os.utime(path)  # used now
        return kept
    except FileNotFoundError:
        pass
    except CorruptTokens as corruption:
        log.warning("tokens in %s are made anew: the file is damaged: %s", path, corruption)
    except OSError as error:
        log.warning("tokens are made anew: %s cannot be read: %s", path, error)
    made = tuple(make(examples))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_rows(path, key, [item.numbers() for item in made])
        _tidy(folder, path)
    except OSError as error:
        log.warning("tokens are not kept for the next time in %s: %s", folder, error)
    return made


def token_folder() -> Path | None:
    """Return where tokens are kept, or None where the user wants none kept."""
    own = os.environ.get(CACHE_VARIABLE)
    if own is not None:
        return Path(own).expanduser() / FOLDER if own.strip() else None
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "adaptive-lora" / FOLDER


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return SHA-256 over what a tokenizer does to texts; None where that is written in Python.

    The rules hold vocabulary, merges, added tokens, normalisation and special tokens around a text.
    What it was loaded from does not enter, so copies have the same digest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call
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
    """Return whether a chat template writes when it is used: the same data have other tokens then.

    Templates have `strftime_now` for that.
    """
    inner = getattr(processor, "tokenizer", None)
    templates = (getattr(each, "chat_template", None) for each in (processor, inner))
    return any("strftime_now" in str(template) for template in templates)


def _key(examples: Sequence[Example], made_from: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    versions = [__version__, *(version(name) for name in ("transformers", "tokenizers"))]
    total.update(json.dumps([FORMAT, versions, made_from], sort_keys=True).encode())
    for e in examples:  # JSON, because no text can stand for the end of one and begin the next
        texts = (e.prompt, e.response, e.second, e.question, e.messages, e.chat_text)
        total.update(json.dumps(texts).encode() + b"\n")
    return total.hexdigest()


def _tidy(folder: Path, newest: Path) -> None:
    """Remove the files not used for the longest time, and unfinished ones that nobody writes."""
    found = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it at this moment
            about = path.stat()
            if path.suffix == PARTIAL and time.time() - about.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX and path != newest:
                found.append((about.st_mtime, about.st_size, path))
    room = MOST_BYTES - newest.stat().st_size
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink(missing_ok=True)
