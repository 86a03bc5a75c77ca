"""One run's records on local disk, in the order in which they were made.

    SPOOL/KEY/journal.jsonl     one record a line, only ever appended to
    SPOOL/KEY/delivered.jsonl   how far the store has it, and what was learned there (the run's id)
    SPOOL/KEY/files/...         copies of artifacts, deleted once they are delivered
    SPOOL/KEY/lock              held by the process that writes and sends

A record is in the file before anything is sent. It survives the end of the process at once, and
the end of the machine after the next `settle` (the sender calls it at least once a second and
before it sends). A last line that a crash cut off counts as not written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from adaptive_lora.errors import TrackingError
from adaptive_lora.tracking.records import CorruptJournal, Record, read_object, read_record

RECORDS, DELIVERED, FILES, LOCK = "journal.jsonl", "delivered.jsonl", "files", "lock"
KEY = re.compile(r"\d{13}-[0-9a-f]{12}")
"""Names of journals (`spool.new_key`)."""
_LASTING = ("run_id", "model_id", "refused")
"""Facts of an earlier process that are of use."""


class Journal:
    """The records of one run; one process at a time holds it.

    Appending and reading may happen in different threads.
    """

    def __init__(self, folder: Path, lock: FileLock) -> None:
        """Use `create` or `take`."""
        self.folder, self._lock = folder, lock
        self._guard = threading.Lock()
        self._dirty = False
        self.finished = False
        """Whether nothing more will be appended."""
        self.facts: dict[str, str] = {}
        """Learned at delivery: `run_id`, `artifact_uri`, `refused` (why it is not taken)."""
        self.delivered = 0
        """Bytes of the file whose records the store has."""
        self.metrics_sent = 0
        self.done: set[str] = set()
        """Parts of the record in delivery that the store has already."""
        self.known: set[tuple[str, int]] = set()
        """(metric, step) that the run has from elsewhere and that are not sent again."""
        self._read_delivered()
        self._records = (folder / RECORDS).open("ab", buffering=0)
        self._end = _whole_lines(folder / RECORDS)
        self._records.truncate(self._end)
        self.header: Mapping[str, Any] = next(iter(self.records(0)), _NOTHING).values
        """The first record: which run, which store."""

    @classmethod
    def create(cls, outbox: Path, key: str, header: Mapping[str, Any]) -> Journal:
        """Begin a journal; the header says which run of which store it belongs to.

        Raises:
            TrackingError: the folder cannot be written.
        """
        folder = outbox / key
        try:
            journal = cls(folder, _made(folder))
        except OSError as error:
            raise _unwritable(folder, error) from error
        journal.append("run", header)
        journal.header = header
        journal.settle()
        return journal

    @classmethod
    def take(cls, folder: Path) -> Journal | None:
        """Take over a journal that its process left; None where one still holds it.

        Raises:
            CorruptJournal: it cannot be read.
        """
        try:
            lock = _held(folder / LOCK)
        except Timeout:
            return None
        try:
            return cls(folder, lock)
        except CorruptJournal:
            lock.release()
            raise

    @property
    def key(self) -> str:
        """Name of the run before the store has given it an id."""
        return self.folder.name

    @property
    def pending(self) -> bool:
        """Whether the store lacks records that it may still take."""
        return self.delivered < self._end and "refused" not in self.facts

    def append(self, op: str, values: Mapping[str, Any]) -> None:
        """Write a record.

        Raises:
            TrackingError: the disk is full or cannot be written; the journal stays as it was.
        """
        line = json.dumps({"op": op, **values}, allow_nan=False).encode() + b"\n"
        with self._guard:
            # Asked, not counted: an interrupt may have fallen between the last write and its sum.
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
        """Force what was written to the disk."""
        with self._guard:
            if self._dirty and not self._records.closed:
                os.fsync(self._records.fileno())
                self._dirty = False

    def keep(self, source: Path) -> str:
        """Copy a file or folder into the journal, forced to the disk; return where it is there.

        Raises:
            TrackingError: the disk is full or cannot be written; nothing is left of the copy.
        """
        held = self.folder / FILES / uuid4().hex
        try:
            if source.is_dir():
                shutil.copytree(source, held)
            else:
                held.mkdir()
                shutil.copy(source, held)
            for path in held.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
        except OSError as error:
            shutil.rmtree(held, ignore_errors=True)
            raise _unwritable(self.folder, error) from error
        return f"{FILES}/{held.name}"

    def records(self, start: int | None = None) -> Iterator[Record]:
        """Read the records from a byte on; by default those that the store does not have.

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

    def acknowledge(self, record: Record, metrics: int = 0) -> None:
        """Note that the store has everything up to a record."""
        self.delivered, self.done = record.end, set()
        self.metrics_sent += metrics
        self._note({"delivered": self.delivered, "metrics": self.metrics_sent})
        if "held" in record.values:
            shutil.rmtree(self.folder / record.values["held"], ignore_errors=True)

    def step(self, name: str, call: Callable[[], object]) -> None:
        """Do a part of the record in delivery, once: what failed later does not repeat it."""
        if name not in self.done:
            call()
            self.done.add(name)

    def learn(self, **facts: str) -> None:
        """Note what the store said, such as the id of the run."""
        self.facts.update(facts)
        self._note({"facts": facts})

    def retry(self) -> None:
        """Forget that the store refused something, to try it once more."""
        self.facts.pop("refused", None)

    def finish(self) -> None:
        """Say that nothing more will be appended."""
        self.settle()
        with self._guard:
            self._records.close()
            self.finished = True

    def release(self) -> None:
        """Let go of the journal; it stays on disk."""
        self.finish()
        self._lock.release()

    def remove(self) -> None:
        """Let go of the journal and delete it."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, values: Mapping[str, Any]) -> None:
        with suppress(OSError), (self.folder / DELIVERED).open("ab") as file:
            # Not forced to disk: what is delivered twice is found there and not made twice.
            file.write(json.dumps(values).encode() + b"\n")

    def _read_delivered(self) -> None:
        path = self.folder / DELIVERED
        if not path.exists():
            return
        os.truncate(path, _whole_lines(path))
        for line in path.read_bytes().splitlines():
            values = read_object(line, path)
            facts = values.get("facts", {})
            numbers = [values.get("delivered", 0), values.get("metrics", 0)]
            if not isinstance(facts, dict) or not all(type(n) is int and n >= 0 for n in numbers):
                raise CorruptJournal(f"{path} is damaged: {line[:80]!r}")
            # Where files go is asked of the store anew, not taken from a file.
            self.facts.update({name: str(facts[name]) for name in _LASTING if name in facts})
            self.delivered = values.get("delivered", self.delivered)
            self.metrics_sent = values.get("metrics", self.metrics_sent)


_NOTHING = Record(op="run", values={}, end=0)


def journals(outbox: Path) -> list[Path]:
    """Return the folders of all journals in a spool, oldest first."""
    return sorted(path.parent for path in outbox.glob(f"*/{RECORDS}"))


def sweep(outbox: Path) -> None:
    """Remove what is left of journals whose process died before the first record, or removing them.

    Nothing but folders that `new_key` named, with nothing in them but what belongs to a journal.
    """
    for folder in outbox.glob("*"):
        if not KEY.fullmatch(folder.name) or not folder.is_dir() or (folder / RECORDS).exists():
            continue
        if {path.name for path in folder.iterdir()} - {DELIVERED, FILES, LOCK}:
            continue
        with suppress(OSError):  # held: it is being made or removed just now
            lock = _held(folder / LOCK)
            if not (folder / RECORDS).exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def header_of(folder: Path) -> Mapping[str, Any]:
    """Return the header of a journal that another process may hold; empty where it has none yet."""
    with suppress(OSError, CorruptJournal), (folder / RECORDS).open("rb") as file:
        return read_record(file.readline(), 0, folder / RECORDS).values
    return {}


def _made(folder: Path) -> FileLock:
    """Make a journal's folder and hold it; another process's `sweep` may take it for left."""
    while True:
        (folder / FILES).mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(Timeout, FileNotFoundError):
            lock = _held(folder / LOCK)
            if (folder / FILES).is_dir():
                return lock
            lock.release()


def _held(path: Path) -> FileLock:
    lock = FileLock(path, thread_local=False)
    lock.acquire(timeout=0)
    return lock


def _whole_lines(path: Path) -> int:
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


def _unwritable(folder: Path, error: OSError) -> TrackingError:
    reason = error.strerror or str(error)
    if isinstance(error, shutil.Error):  # one (source, copy, reason) a file
        reason = str(error.args[0][0][2])
    return TrackingError(
        f"results cannot be kept in {folder}: {reason}. Free some disk space or "
        "set --output to a folder that can be written; the same command continues."
    )
