"""Disk cache of a data set's tokens, keyed by a hash of everything that determines them.

The folder is ADAPTIVE_LORA_CACHE, else `adaptive-lora` in XDG_CACHE_HOME, else in `~/.cache`; an
empty ADAPTIVE_LORA_CACHE turns the cache off. Several processes may share it: files are written
atomically, and two processes write equal content under one name. Where the disk is full or
read-only, texts are tokenised each time, into memory. Tokens that must not be kept are in a file of the
folder without a name. Files are written by pyarrow; where it is not installed, tokens are in memory alone.

The cache of `datasets` is not used: its `map` names files by a 64-bit hash of pickled objects, does
not verify what it reads, and stores nothing for data sets made in memory, as these are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from adaptive_lora import __version__
from adaptive_lora.data.examples import Example
from adaptive_lora.data.sequences import ROWS_AT_ONCE, LazySequence
from adaptive_lora.errors import installed
from adaptive_lora.interruption import PARTIAL

if TYPE_CHECKING:
    from adaptive_lora.data.arrow_file import Columns, Row

CACHE_VARIABLE = "ADAPTIVE_LORA_CACHE"
"""Name of the environment variable with the cache folder; empty: no cache."""
FOLDER = "tokens"
"""Name of the folder of tokens inside the cache folder."""
MOST_BYTES = 2 * 2**30
"""Maximum size of all files together in bytes; beyond it, the least recently used are removed."""
FORMAT = 4
"""Version of the tokenisation code; to be raised when tasks tokenise the same examples differently."""
_SUFFIX = ".arrow"
_EARLIER_SUFFIX = ".safetensors"
"""Suffix of the files of versions to 0.3."""
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


class PreparedRows(LazySequence[T]):
    """Prepared examples, each made on access from its example and its integers."""

    def __init__(self, examples: Sequence[Example], kind: type[T], columns: Columns) -> None:
        """Take the integers of each example as columns."""
        self._examples, self._kind = examples, kind
        self._columns = {
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in columns.chunks(name)]
            for name in columns.names
        }

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def item(self, index: int) -> T:
        """Return a prepared example."""
        return self._kind.of(self._examples[index], self._numbers(index))

    def __iter__(self) -> Iterator[T]:
        """Yield the prepared examples; the texts are read in their order."""
        return map(self._kind.of, self._examples, map(self._numbers, range(len(self))))

    def _numbers(self, index: int) -> dict[str, list[int]]:
        chunk, at = divmod(index, ROWS_AT_ONCE)
        numbers = {}
        for name, chunks in self._columns.items():
            offsets, values = chunks[chunk]
            numbers[name] = values[offsets[at] : offsets[at + 1]].tolist()
        return numbers


def cached_tokens(
    examples: Sequence[Example],
    kind: type[T],
    make: Callable[[Sequence[Example]], Iterable[T]],
    made_from: Mapping[str, Any] | None,
) -> Sequence[T]:
    """Return the prepared examples, from the cache if they were prepared before.

    Args:
        examples: examples of the data set, at least one.
        kind: type of the prepared examples.
        make: function that tokenises; its errors are raised each time.
        made_from: everything else that determines the result: settings and `tokenizer_digest`, JSON-ready;
            None if the result must not be kept.
    """
    if not installed("pyarrow"):
        return tuple(make(examples))
    from adaptive_lora.data.arrow_file import CorruptColumns, integers, read_columns, stored, write_columns

    def numbers() -> tuple[Any, Iterable[Row]]:
        return integers(item.numbers() for item in make(examples))

    folder = token_folder()
    if folder is None or made_from is None:
        return PreparedRows(examples, kind, stored(*numbers(), folder))
    key = _key(examples, {**made_from, "kind": kind.__name__})
    path = folder / f"{key}{_SUFFIX}"
    log = logging.getLogger(__name__)
    try:
        columns = read_columns(path, key, len(examples))
        with suppress(OSError):
            os.utime(path)  # mark as recently used
        return PreparedRows(examples, kind, columns)
    except FileNotFoundError:
        pass
    except CorruptColumns as corruption:
        log.warning("tokens in %s are recomputed: the file is corrupt: %s", path, corruption)
    except OSError as error:
        log.warning("tokens are recomputed: %s cannot be read: %s", path, error)
    made: Columns | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = write_columns(path, key, *numbers())
        _tidy(folder, path)
    except OSError as error:
        log.warning("tokens cannot be cached in %s: %s", folder, error)
    return PreparedRows(examples, kind, stored(*numbers(), None) if made is None else made)


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
            elif path.suffix in (_SUFFIX, _EARLIER_SUFFIX) and path != newest:
                found.append((about.st_mtime, about.st_size, path))
    room = MOST_BYTES - newest.stat().st_size
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                path.unlink(missing_ok=True)
