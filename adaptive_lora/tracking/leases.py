"""Leases of trials among several processes on one study, and their takeover from dead processes.

All state is in the tracking store, as tags. MLflow has no atomic "set this tag if it is unset"; two
processes that both read a tag and then write it would both take the lease. So every decision by
reading and writing is made under the study's *lock*, which one process has at a time. The lock is
Lamport's bakery algorithm (CACM 17(8), 1974), which needs only registers with one writer each. The
registers are tags of the experiment, one per owner.

A *lease* is a tag of a run: its owner, and a counter that the owner increases while it is alive.
Clocks of different machines are not compared: a process that waits for an owner measures on its own
monotonic clock for how long the counter has not changed. The end of a process on the same machine is
detected at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil

from adaptive_lora.errors import LeaseLost, TrackingError
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.recorder import Recorder
from adaptive_lora.tracking.retries import STORE_ERRORS

LEASE = "adaptive_lora.claim"
_LOCK = "adaptive_lora.turn"
_BEATS = 8
"""Number of heartbeats within the time after which a silent owner is taken for dead."""
_LONGEST_GAP = 5.0
"""Maximum seconds counted between two checks, because an unreachable store is not silence of the owner."""
_LAST_WORD = 2.0
"""Seconds for which an ending process waits for the store to record it."""
_ALIVE: set[str] = set()
"""Tokens of this process's owners that have not ended."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One study command in one process."""

    machine: str
    pid: int
    started: str
    """Clock ticks from the machine's start to the process's; not affected by setting the clock."""
    token: str
    """Random token that distinguishes owners with equal process ids."""

    @classmethod
    def here(cls) -> Owner:
        """Return a new owner in this process; `ended` marks its end."""
        owner = cls(_machine(), os.getpid(), _started(os.getpid()) or "", uuid4().hex[:8])
        _ALIVE.add(owner.token)
        return owner

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Parse the text of `str`; None for other texts."""
        parts = text.split("/")
        if len(parts) != 4 or not parts[1].isdigit():
            return None
        return cls(parts[0], int(parts[1]), parts[2], parts[3])

    def __str__(self) -> str:
        """Return the owner as one word, without the machine's name."""
        return f"{self.machine}/{self.pid}/{self.started}/{self.token}"

    def ended(self) -> None:
        """Mark the command as ended while the process continues."""
        _ALIVE.discard(self.token)

    @property
    def is_gone(self) -> bool:
        """State of the process: true if known to have ended; unknown, so false, on other machines."""
        if self.machine != _machine():
            return False
        if self.pid == os.getpid() and self.started == (_started(self.pid) or ""):
            return self.token not in _ALIVE
        return _started(self.pid) != self.started


def _machine() -> str:
    """Return a digest of host, boot and process namespace, within which process ids are unique."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\x1f".join(facts).encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """Return the start time of a process, or None if it no longer exists."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists() or not psutil.pid_exists(pid):
            return None
        return ""  # a system without /proc
    return None if fields[0] in "ZX" else fields[19]


class Patience:
    """Observed time of silence of other owners."""

    def __init__(self, silence: float) -> None:
        """Take an owner for dead after `silence` seconds without a heartbeat."""
        self.silence = silence
        self._seen: dict[str, tuple[str, float, float]] = {}

    def is_over(self, place: str, value: str) -> bool:
        """Record the present value of a lease; return whether its owner is dead.

        Args:
            place: key of the tag.
            value: value of the tag: owner and counter.
        """
        owner = Owner.parse(value.partition("#")[0])
        if owner is None or owner.is_gone:
            return True
        now = time.monotonic()
        before, looked, waited = self._seen.get(place, ("", now, 0.0))
        waited = waited + min(now - looked, _LONGEST_GAP) if value == before else 0.0
        self._seen[place] = (value, now, waited)
        return waited >= self.silence


@dataclass(kw_only=True, slots=True)
class Heartbeat:
    """Background thread that increases the counter of one tag until it is stopped."""

    write: Callable[[int], None]
    """Function that writes the counter."""
    interval: float
    """Seconds."""
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start; the first write is after one interval."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """Stop.

        Args:
            wait: whether to wait for a write in progress, so that none comes later.
        """
        self._over.set()
        if wait and self._thread is not None:
            self._thread.join(timeout=self.interval)

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(self.interval):
            count += 1
            with suppress(*STORE_ERRORS, TrackingError):  # unreachable: others do not see it either
                self.write(count)


class Leases:
    """The leases of one process on one study."""

    def __init__(self, store: Store, study_id: str, silence: float) -> None:
        """Join a study.

        Args:
            store: tracking store of the study.
            study_id: id of the study.
            silence: seconds after which a silent owner is taken for dead; equal in all processes.
        """
        self.store, self.owner = store, Owner.here()
        self.patience = Patience(silence)
        self._interval = silence / _BEATS
        self._prefix = f"{_LOCK}.{study_id}."
        # A heartbeat may need the study's lock while this process takes a trial; they share one register.
        self._one_thread = threading.Lock()

    @property
    def mine(self) -> str:
        """Value of a new lease."""
        return f"{self.owner}#0"

    def is_free(self, run_id: str, lease: str) -> bool:
        """Return whether a lease has no living owner, or is this process's own."""
        return not lease or self._is_own(lease) or self.patience.is_over(run_id, lease)

    def _is_own(self, lease: str) -> bool:
        return lease.startswith(f"{self.owner}#")

    def release(self, run: Recorder) -> None:
        """Give an own lease up at once if the store answers; otherwise it expires by silence."""
        if self.store.outbox.away:
            return

        def write() -> None:
            client = self.store.outbox.uploader.client
            with suppress(*STORE_ERRORS, TrackingError):
                if self._is_own(client.get_run(run.run_id).data.tags.get(LEASE, "")):
                    client.set_tag(run.run_id, LEASE, "")

        thread = threading.Thread(target=write, name="release", daemon=True)
        thread.start()
        thread.join(timeout=_LAST_WORD)

    @contextmanager
    def held(self, run_id: Callable[[], str]) -> Iterator[Callable[[], None]]:
        """Keep a lease alive inside the block.

        The yielded function raises `LeaseLost` if another process has taken the lease.

        Args:
            run_id: function that returns the id of the leased run; may raise while it has none.
        """
        lost = threading.Event()
        client = self.store.outbox.uploader.client  # without retries, which could write long after the decision to
        written = time.monotonic()

        def write(count: int, *, locked: bool = False) -> None:
            nonlocal written
            lease = client.get_run(run_id()).data.tags.get(LEASE, "")
            now = time.monotonic()
            if not self._is_own(lease):
                lost.set()
            elif locked or now - written < self.patience.silence / 2:
                client.set_tag(run_id(), LEASE, f"{self.owner}#{count}")
                written = now
            else:
                # Nobody takes a lease within `silence` after a heartbeat. A late one could overwrite a lease that
                # another process takes just now, so it is decided under the lock.
                with self.lock():
                    write(count, locked=True)

        def check() -> None:
            if lost.is_set():
                raise LeaseLost("another process took this trial over, because this one seemed dead.")

        heart = Heartbeat(write=write, interval=self._interval)
        heart.start()
        try:
            yield check
        finally:
            heart.stop(wait=not self.store.outbox.away)  # a user who stops it does not wait

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study's lock inside the block, which should be short.

        Raises:
            TrackingError: the store does not answer.
        """
        key = f"{self._prefix}{self.owner.token}"
        with self._one_thread:
            self._write(key, 0, 0)  # "choosing"
            ticket = 1 + max((number for number, _ in self._tickets().values()), default=0)
            self._write(key, ticket, 0)
            heart = Heartbeat(write=lambda count: self._write(key, ticket, count), interval=self._interval)
            heart.start()
            try:
                self._await(key, ticket)
                yield
            finally:
                heart.stop()
                with suppress(*STORE_ERRORS):
                    self.store.client.delete_experiment_tag(self.store.experiment_id, key)

    def _await(self, key: str, ticket: int) -> None:
        """Wait until no living process is choosing or has a lower ticket."""
        pause = 0.05
        while True:
            before = {
                other: value
                for other, (number, value) in self._tickets().items()
                if other != key and (number, other) < (ticket, key)
            }
            dead = [other for other, value in before.items() if self.patience.is_over(other, value)]
            for other in dead:
                with suppress(*STORE_ERRORS):  # another process removed it
                    self.store.client.delete_experiment_tag(self.store.experiment_id, other)
            if len(dead) == len(before):
                return
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _write(self, key: str, ticket: int, count: int) -> None:
        value = f"{self.owner}#{ticket}#{count}"
        self.store.client.set_experiment_tag(self.store.experiment_id, key, value)

    def _tickets(self) -> dict[str, tuple[int, str]]:
        """Return tag -> (ticket, whole value) of all processes at the study; ticket 0: it is choosing one."""
        tags = self.store.client.get_experiment(self.store.experiment_id).tags
        found = {}
        for key, value in tags.items():
            if key.startswith(self._prefix):
                parts = value.split("#")
                number = int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else 0
                found[key] = (number, value)
        return found
