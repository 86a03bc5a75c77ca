"""The journal of one run: its records on local disk, in order.

    OUTBOX/KEY/journal.jsonl     one record per line, append-only
    OUTBOX/KEY/delivered.jsonl   delivered position, and answers of the store (the run's id)
    OUTBOX/KEY/files/...         copies of artifacts, deleted after delivery
    OUTBOX/KEY/lock              held by the process that writes and sends

A record is written before it is sent. It survives a crash of the process at once, and a crash of the
machine after the next `settle` (the sender calls it at least once per second and before it sends). An
incomplete last line counts as not written.

Lines are read strictly, because `sync` may be given a folder written by others. Records are executed
with the rights of the user who sends them: files are read, sent and deleted. So a record can name only
files of its own journal, and lines of any other form are corrupt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from adaptive_lora.errors import TrackingError
from adaptive_lora.interruption import replacing

RECORDS, DELIVERED, FILES, LOCK = "journal.jsonl", "delivered.jsonl", "files", "lock"
KEY = re.compile(r"\d{13}-[0-9a-f]{12}")
"""Pattern of the names of journals, from `new_key`."""
_LASTING = ("run_id", "model_id", "refused")
"""Facts of an earlier process that remain valid. The artifact location is read from the store again."""
_HELD = re.compile(r"files/[0-9a-f]{32}")
_DATASET = {"name", "digest", "source_type", "source", "profile"}


class CorruptJournal(ValueError):
    """A line of a journal cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of a journal."""

    op: str
    """Name of the operation in the store: a method of `uploader.Uploader`."""
    values: Mapping[str, Any]
    end: int
    """Position in the file after this line, in bytes."""


class Journal:
    """The records of one run; one process at a time has the lock.

    Appending and reading may be in different threads.
    """

    def __init__(self, folder: Path, lock: FileLock) -> None:
        """Use `create` or `take` instead."""
        self.folder, self._lock = folder, lock
        self._guard = threading.Lock()
        self._dirty = False
        self.finished = False
        """Mark of a journal that will get no more records."""
        self.facts: dict[str, str] = {}
        """Answers of the store: `run_id`, `artifact_uri`, `refused` (the reason of a refusal)."""
        self.delivered = 0
        """Position in the file, in bytes, up to which the store has all records."""
        self.done: set[str] = set()
        """Parts of the current record that the store already has."""
        self.unsure = True
        """Possibility of objects in the store that are not known here: made by a request that was not answered."""
        self.known: set[tuple[str, int]] = set()
        """(metric, step) pairs that the run already has and that are not sent again."""
        self._read_delivered()
        self._end = _cut_to_whole_lines(folder / RECORDS)
        first = next(iter(self.records(0)), None)
        self.header: Mapping[str, Any] = {} if first is None else first.values
        """The first record, with run and store."""
        self._records = (folder / RECORDS).open("ab", buffering=0)

    @classmethod
    def create(cls, outbox: Path, key: str, header: Mapping[str, Any]) -> Journal:
        """Create a journal, with a header that gives run and store.

        Raises:
            TrackingError: the folder cannot be written to.
        """
        folder = outbox / key
        try:
            lock = _made(folder)
            (folder / RECORDS).touch()
            journal = cls(folder, lock)
        except OSError as error:
            raise _unwritable(folder, error) from error
        journal.append("run", header)
        journal.header, journal.unsure = header, "run_id" in header  # that run may be of an earlier process
        journal.settle()
        return journal

    @classmethod
    def take(cls, folder: Path) -> Journal | None:
        """Take over the journal of a dead process; None if a process still has its lock.

        Raises:
            CorruptJournal: it cannot be read.
            FileNotFoundError: another process has removed it.
        """
        try:
            lock = _held(folder / LOCK)
        except Timeout:
            return None
        try:
            return cls(folder, lock)
        except (CorruptJournal, OSError):
            lock.release()
            raise

    @property
    def key(self) -> str:
        """Key of the run, used until the store has assigned an id."""
        return self.folder.name

    @property
    def pending(self) -> bool:
        """Presence of undelivered records that the store has not refused."""
        return self.delivered < self._end and "refused" not in self.facts

    @property
    def undelivered(self) -> bool:
        """Presence of records that the store lacks, including refused ones."""
        return self.delivered < self._end or "refused" in self.facts

    def append(self, op: str, values: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            TrackingError: the disk is full or cannot be written to; the journal is unchanged.
        """
        line = json.dumps({"op": op, **values}, allow_nan=False).encode() + b"\n"
        with self._guard:
            # Read from the file, because an interrupt may have prevented the update of a counter.
            self._end = os.fstat(self._records.fileno()).st_size
            try:
                if self._records.write(line) != len(line):
                    raise OSError("disk full")
            except OSError as error:
                with suppress(OSError):
                    self._records.truncate(self._end)
                raise _unwritable(self.folder, error) from error
            self._end += len(line)
            self._dirty = True

    def settle(self) -> None:
        """Flush all writes to disk."""
        with self._guard:
            if self._dirty and not self._records.closed:
                os.fsync(self._records.fileno())
                self._dirty = False

    def keep(self, source: Path) -> str:
        """Copy a folder into the journal, flushed to disk; return its path in the journal.

        Raises:
            TrackingError: the disk is full or cannot be written to; the copy is removed.
        """
        held = f"{FILES}/{uuid4().hex}"
        try:
            with replacing(self.folder / held) as copy:
                shutil.copytree(source, copy)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return held

    def records(self, start: int | None = None) -> Iterator[Record]:
        """Read the records from a byte position on; by default the undelivered ones.

        Raises:
            CorruptJournal: a line cannot be read.
        """
        end = self._end
        position = self.delivered if start is None else start
        with (self.folder / RECORDS).open("rb") as file:
            file.seek(position)
            while position < end:
                line = file.readline()
                position += len(line)
                yield read_record(line, position, self.folder / RECORDS)

    def acknowledge(self, record: Record) -> None:
        """Record that the store has everything up to a record."""
        self.delivered, self.done = record.end, set()
        self._note({"delivered": self.delivered})
        if "held" in record.values:
            shutil.rmtree(self.folder / record.values["held"], ignore_errors=True)

    def step(self, name: str, call: Callable[[], object]) -> None:
        """Do a part of the current record once; it is not repeated if a later part fails."""
        if name not in self.done:
            call()
            self.done.add(name)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Be unsure from now on unless the block, a request that makes an object, is answered."""
        earlier, self.unsure = self.unsure, True
        yield
        self.unsure = earlier

    def learn(self, **facts: str) -> None:
        """Record answers of the store, such as the id of the run."""
        self.facts.update(facts)
        self._note({"facts": facts})

    def retry(self) -> None:
        """Clear the refusal by the store, to try again."""
        self.facts.pop("refused", None)

    def finish(self) -> None:
        """Mark the journal as complete."""
        self.settle()
        with self._guard:
            self._records.close()
            self.finished = True

    def release(self) -> None:
        """Release the lock; the journal stays on disk."""
        self.finish()
        self._lock.release()

    def remove(self) -> None:
        """Delete the journal, its records before the lock is released, so that no other process takes it over."""
        self.finish()
        with suppress(OSError):
            (self.folder / RECORDS).unlink()
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, values: Mapping[str, Any]) -> None:
        with suppress(OSError), (self.folder / DELIVERED).open("ab") as file:
            # Not flushed to disk, because a repeated delivery finds existing objects and makes none twice.
            file.write(json.dumps(values).encode() + b"\n")

    def _read_delivered(self) -> None:
        path = self.folder / DELIVERED
        if not path.exists():
            return
        _cut_to_whole_lines(path)
        for line in path.read_bytes().splitlines():
            values = _read_object(line, path)
            facts, delivered = values.get("facts", {}), values.get("delivered", self.delivered)
            if not isinstance(facts, dict) or type(delivered) is not int or delivered < 0:
                raise CorruptJournal(f"{path} is corrupt: {line[:80]!r}")
            self.facts.update({name: str(facts[name]) for name in _LASTING if name in facts})
            self.delivered = delivered


def new_key() -> str:
    """Return a unique name for a run that sorts by time."""
    return f"{time.time_ns() // 1_000_000:013d}-{uuid4().hex[:12]}"


def journals(outbox: Path) -> list[Path]:
    """Return the folders of all journals in an outbox, oldest first."""
    return sorted(path.parent for path in outbox.glob(f"*/{RECORDS}"))


def sweep(outbox: Path) -> None:
    """Remove remains of journals whose process died before the first record or while removing them.

    Only folders with names from `new_key` are removed, and only if they have nothing but files of a journal.
    """
    for folder in outbox.glob("*"):
        if not KEY.fullmatch(folder.name):
            continue
        with suppress(OSError):  # locked or gone: it is being made or removed
            if {path.name for path in folder.iterdir()} - {DELIVERED, FILES, LOCK}:
                continue
            lock = _held(folder / LOCK)
            if not (folder / RECORDS).exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def header_of(folder: Path) -> Mapping[str, Any]:
    """Return the header of a journal, which another process may have locked; empty if it has none yet."""
    with suppress(OSError, CorruptJournal), (folder / RECORDS).open("rb") as file:
        return read_record(file.readline(), 0, folder / RECORDS).values
    return {}


def read_record(line: bytes, end: int, place: Path) -> Record:
    """Read a line of the file `place`, which ends at the byte position `end`.

    Raises:
        CorruptJournal: it is not a line written by a recorder.
    """
    values = _read_object(line, place)
    op = values.pop("op", None)
    if not isinstance(op, str) or op not in _FIELDS:
        raise CorruptJournal(f"{place} is corrupt: it asks for {op!s:.80}")
    fields = dict(_FIELDS[op])
    if op == "run" and not _text(values.get("run_id")):
        fields |= _NEW_RUN
    fields |= {name: fits for name, fits in _OPTIONAL.get(op, {}).items() if name in values}
    wrong = [name for name, fits in fields.items() if name not in values or not fits(values[name])]
    if wrong or not _text(values.get("store", "")):
        raise CorruptJournal(f"{place} is corrupt: {op} with {', '.join(wrong) or 'store'}")
    return Record(op=op, values=values, end=end)


def _read_object(line: bytes, place: Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptJournal(f"{place} is corrupt: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise CorruptJournal(f"{place} is corrupt: {type(values).__name__} where an object belongs")
    return values


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _copy(value: Any) -> bool:
    return isinstance(value, str) and bool(_HELD.fullmatch(value))


_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "run": {},
    "params": {"values": _texts},
    "tags": {"values": _texts},
    "metric": {"k": _text, "v": lambda v: isinstance(v, int | float), "s": _whole, "t": _whole},
    "data": {"dataset": lambda v: _texts(v) and v.keys() == _DATASET},
    "artifacts": {"held": _copy, "path": lambda v: v is None or _text(v)},
    "table": {"name": _text},
    "model": {"held": _copy},
    "status": {"status": _text, "time": _whole},
}
"""Operation -> types of its fields."""
_OPTIONAL: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "metric": {"m": lambda v: v is True, "d": lambda v: isinstance(v, list) and [*map(_text, v)] == [True] * 2},
    "data": {"context": _text},
    "model": {"name": _text, "params": _texts, "tags": _texts},
}
"""Operation -> types of the fields that journals of earlier versions lack."""
_NEW_RUN: Mapping[str, Callable[[Any], bool]] = {
    "key": _text, "experiment_id": _text, "name": _text, "tags": _texts, "time": _whole,
}  # fmt: skip
"""Types of the fields of a run that the store does not have yet."""


def _made(folder: Path) -> FileLock:
    """Make a journal's folder and lock it; repeated if another process's `sweep` removed it."""
    while True:
        (folder / FILES).mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(Timeout, FileNotFoundError):
            lock = _held(folder / LOCK)
            if (folder / FILES).is_dir():
                return lock
            lock.release()


def _held(path: Path) -> FileLock:
    return FileLock(path, timeout=0, thread_local=False).acquire().lock


def _cut_to_whole_lines(path: Path) -> int:
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)
    return whole


def _unwritable(folder: Path, error: OSError) -> TrackingError:
    # shutil.Error has one (source, copy, reason) per file
    reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
    return TrackingError(
        f"results cannot be kept in {folder}: {reason}. Free some disk space or "
        "set --output to a folder that can be written; the same command continues."
    )
