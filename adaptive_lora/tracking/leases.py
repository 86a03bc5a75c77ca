"""The lease of a study: one command at a time runs it, and keeps a heartbeat while it does.

A lease is a tag of the study's parent run: the command that holds it, since when, and a counter that it increases
while it is alive. `adaptive-lora train` takes a lease of its one trial, under a key of its own, so that several trials
of a study may be trained at once; a lease of the whole study excludes all others.

MLflow has no atomic "set this tag if it is unset". So a lease is written unconfirmed, and then all leases are read:
of two commands that write and then read, one at least sees the other. It withdraws if the other's lease is confirmed;
of two unconfirmed ones the lower token goes on. One that was overwritten withdraws too; it may notice that only at its
next heartbeat, which loses the lease.

Clocks of different machines are not compared: a command that waits for an owner elsewhere measures on its own monotonic
clock for how long the counter has not changed. The end of a process on the same machine is detected at once.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil
from mlflow.entities import Run

from adaptive_lora.errors import LeaseLost, StudyInUse, TrackingError
from adaptive_lora.tracking.connection import Store
from adaptive_lora.tracking.retries import STORE_ERRORS

LEASE = "adaptive_lora.lease"
"""Tag of a study's lease, and prefix of those of single trials."""
_BEATS = 8
"""Number of heartbeats within the time after which a silent owner is taken for dead."""
_LONGEST_GAP = 5.0
"""Maximum seconds counted between two checks, because an unreachable store is not silence of the owner."""
_POLL = 2.0
"""Seconds between two checks of another command's lease at most."""
_MOMENT = 0.05
"""Seconds between writing a lease and reading it back at least; three times the duration of a request at least."""
_LAST_WORD = 2.0
"""Seconds for which an ending process waits for the store to record it."""
_ALIVE: set[str] = set()
"""Tokens of this process's leases that have not been released."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The command that holds a lease, as its tag names it."""

    host: str
    user: str
    pid: int
    started: str
    """Clock ticks from the machine's start to the process's; not affected by setting the clock."""
    machine: str
    """Digest of host, boot and process namespace, within which process ids are unique."""
    token: str
    """Random token that distinguishes owners with equal process ids."""
    since: str
    """Time at which the lease was taken, in UTC."""
    beats: int = 0
    """Number of heartbeats; 0: the lease is not confirmed yet."""

    @classmethod
    def here(cls) -> Owner:
        """Return a new owner in this process."""
        user = ""
        with suppress(OSError, KeyError, ImportError):  # no entry for the user id, as in some containers
            user = getpass.getuser()
        return cls(
            host=platform.node(),
            user=user,
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            machine=_machine(),
            token=uuid4().hex[:12],
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Parse the text of `str`; None for other texts."""
        try:
            owner = cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError):
            return None
        fits = all(type(getattr(owner, name)) is int for name in ("pid", "beats"))
        return owner if fits and owner.pid > 0 else None

    def __str__(self) -> str:
        """Return the text of the tag."""
        return json.dumps(asdict(self))

    @property
    def is_here(self) -> bool:
        """Presence of the owner on this machine, where the end of its process can be seen."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """State of the owner: true if known to have ended; unknown, so false, on other machines."""
        if not self.is_here:
            return False
        if self.pid == os.getpid() and self.started == (_started(self.pid) or ""):
            return self.token not in _ALIVE
        return _started(self.pid) != self.started

    @property
    def description(self) -> str:
        """The command in words."""
        user = f" of {self.user}" if self.user else ""
        return f"process {self.pid}{user} on {self.host}, since {self.since}"


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


class Watch:
    """Observed signs of life of other owners."""

    def __init__(self, silence: float) -> None:
        """Take an owner for dead after `silence` seconds without a heartbeat."""
        self.silence = silence
        self._seen: dict[str, tuple[int, float, float]] = {}
        self._moved: set[str] = set()

    def is_over(self, owner: Owner) -> bool:
        """Record the present counter of an owner; return whether it is dead."""
        if owner.is_gone:
            return True
        now = time.monotonic()
        beats, looked, waited = self._seen.get(owner.token, (owner.beats, now, 0.0))
        if owner.beats == beats:
            waited += min(now - looked, _LONGEST_GAP)
        else:
            waited = 0.0
            self._moved.add(owner.token)
        self._seen[owner.token] = (owner.beats, now, waited)
        return waited >= self.silence

    def is_seen_alive(self, owner: Owner) -> bool:
        """Return whether an owner is known to be alive: its process is here, or its counter has changed."""
        return owner.is_here or owner.token in self._moved


class Lease:
    """The lease of a study, or of one of its trials, by one command."""

    def __init__(self, store: Store, study_id: str, *, signature: str = "", silence: float = 120.0) -> None:
        """Prepare a lease; `take` takes it.

        Args:
            store: tracking store of the study.
            study_id: id of the study.
            signature: signature of the only trial that is run; empty: the whole study.
            silence: seconds after which a silent owner is taken for dead; equal in all commands.
        """
        self.store, self.study_id = store, study_id
        self.key = f"{LEASE}.{signature}" if signature else LEASE
        self.run_id = ""
        """Id of the parent run with the lease, once it is taken."""
        self._owner = Owner.here()
        self._watch = Watch(silence)
        self._interval = silence / _BEATS
        self._moment = _MOMENT
        self._over, self._lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def take(
        self,
        parents: Callable[[], Sequence[Run]],
        place: Callable[[Run | None], str],
        withdraw: Callable[[str], None],
        *,
        wait: bool,
        say: Callable[[str], None],
    ) -> Sequence[Run]:
        """Take the lease, and keep a heartbeat until `release`.

        Args:
            parents: function that returns the parent runs of the study, oldest first.
            place: function that returns the id of the run for the lease, given the study's parent run or None.
            withdraw: function that takes back what `place` did, given the id.
            wait: whether to wait until other commands have ended; otherwise a living one is an error.
            say: receives a line if there is something to wait for.

        Returns:
            The parent runs.

        Raises:
            StudyInUse: another command runs the study.
            TrackingError: the store does not answer.
        """
        _ALIVE.add(self._owner.token)
        try:
            while True:
                found = self._await_others(parents, wait=wait, say=say)
                self.run_id = place(self._home(found))
                self._write(0)
                found = self._confirmed(parents)
                if found:
                    break
                self._delete()
                withdraw(self.run_id)
        except BaseException:
            self.release()
            raise
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return found

    def check(self) -> None:
        """Check that the lease has not been lost.

        Raises:
            LeaseLost: another command has taken it.
        """
        if self.is_lost:
            raise LeaseLost(
                f"another command took study {self.study_id} over, because this one gave no sign of life. It continues "
                "the trials; nothing that was recorded is lost."
            )

    @property
    def is_lost(self) -> bool:
        """State of the lease: true once another command was seen to have taken it."""
        return self._lost.is_set()

    def release(self) -> None:
        """Stop the heartbeat, and give the lease up at once if the store answers; otherwise it expires."""
        self._over.set()
        _ALIVE.discard(self._owner.token)
        if self.store.outbox.away or not self.run_id:
            return

        def write() -> None:
            if self._thread is not None:
                self._thread.join()  # a later heartbeat would write the tag again
            self._delete()

        thread = threading.Thread(target=write, name="release", daemon=True)
        thread.start()
        thread.join(timeout=_LAST_WORD)

    def others(self, run: Run, *, excluding: bool = False) -> list[Owner]:
        """Return the living owners of other leases in a parent run.

        Args:
            run: the parent run.
            excluding: whether to return only those beside which this lease may not be held.
        """
        held = [Owner.parse(run.data.tags[key]) for key in self._keys(run, excluding=excluding)]
        return [one for one in held if one is not None and not self._is_mine(one) and not self._watch.is_over(one)]

    def _keys(self, run: Run, *, excluding: bool) -> list[str]:
        """Return the tags of a run that are leases, or those that exclude this one."""
        keys = [key for key in run.data.tags if key == LEASE or key.startswith(f"{LEASE}.")]
        return [key for key in keys if not excluding or self.key == LEASE or key in (self.key, LEASE)]

    def _await_others(
        self, parents: Callable[[], Sequence[Run]], *, wait: bool, say: Callable[[str], None]
    ) -> Sequence[Run]:
        """Return the parent runs once no living command excludes this one."""
        said, pause = False, _POLL / 10
        while True:
            found = parents()
            excluding = [one for run in found for one in self.others(run, excluding=True)]
            if not excluding:
                return found
            alive = next((one for one in excluding if self._watch.is_seen_alive(one)), None)
            if alive is not None and not wait:
                raise StudyInUse(
                    f"study {self.study_id} is run by another command: {alive.description}. Wait for its end with "
                    "--wait, or stop it; one command runs several trials at once with --workers or --engine ray."
                )
            if not said:
                said = True
                until = "it ends" if wait else "it gives a sign of life"
                say(
                    f"study {self.study_id} is run by {excluding[0].description}; waiting until {until}, or is silent "
                    f"for {self._watch.silence / 60:g} minutes"
                )
            time.sleep(min(pause, self._interval))
            pause = min(2 * pause, _POLL)

    def _home(self, parents: Sequence[Run]) -> Run | None:
        """Return the parent run of the study: one that another command uses, else the oldest."""
        used = (run for run in parents if any(owner.beats for owner in self.others(run)))
        return next(used, parents[0] if parents else None)

    def _confirmed(self, parents: Callable[[], Sequence[Run]]) -> Sequence[Run]:
        """Confirm the lease and return the parent runs; none: this command has to withdraw."""
        while True:
            time.sleep(self._moment)
            found = parents()
            here = next((run for run in found if run.info.run_id == self.run_id), None)
            own = None if here is None else Owner.parse(here.data.tags.get(self.key, ""))
            home = self._home(found)
            adopted = self.run_id == self.store.parent_run_id
            moved = not adopted and home is not None and home.info.run_id != self.run_id
            excluding = [one for run in found for one in self.others(run, excluding=True)]
            if own is None or not self._is_mine(own) or moved:
                return ()
            if any(one.beats or one.token < self._owner.token for one in excluding):
                return ()
            if not excluding:
                self._write(1)
                self._remove_dead(found)
                return found

    def _remove_dead(self, parents: Sequence[Run]) -> None:
        """Remove the leases of dead commands, for which the next command would have to wait again."""
        for run in parents:
            for key in self._keys(run, excluding=True):
                if (run.info.run_id, key) != (self.run_id, self.key):
                    with suppress(*STORE_ERRORS):  # removed meanwhile
                        self.store.outbox.uploader.client.delete_tag(run.info.run_id, key)

    def _write(self, beats: int) -> None:
        started = time.monotonic()
        self.store.client.set_tag(self.run_id, self.key, str(replace(self._owner, beats=beats)))
        self._moment = max(_MOMENT, 3 * (time.monotonic() - started))

    def _delete(self) -> None:
        """Delete the lease in the store if it is this one."""
        with suppress(*STORE_ERRORS):
            if self._is_own():
                self.store.outbox.uploader.client.delete_tag(self.run_id, self.key)

    def _is_own(self) -> bool:
        """Return whether the lease in the store is this one."""
        tags = self.store.outbox.uploader.client.get_run(self.run_id).data.tags
        owner = Owner.parse(tags.get(self.key, ""))
        return owner is not None and self._is_mine(owner)

    def _is_mine(self, owner: Owner) -> bool:
        return owner.token == self._owner.token

    def _beat(self) -> None:
        beats = 1
        client = self.store.outbox.uploader.client  # without retries, which could write long after the decision to
        while not self._over.wait(self._interval):
            with suppress(*STORE_ERRORS, TrackingError):  # unreachable: others do not see it either
                asked = time.monotonic()
                if not self._is_own():
                    self._lost.set()
                    return
                if time.monotonic() - asked < self._interval:  # a late one could overwrite another's lease
                    beats += 1
                    client.set_tag(self.run_id, self.key, str(replace(self._owner, beats=beats)))
