"""Who holds a claim, and whether that process is known to have ended."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

_ALIVE: set[str] = set()
"""Tokens of the owners of this process that have not ended."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One study command in one process."""

    machine: str
    pid: int
    started: str
    """Clock ticks from the machine's start to the process's; setting the clock does not move it."""
    token: str
    """Tells apart what has the same process number at different times."""

    @classmethod
    def here(cls) -> Owner:
        """Return a new owner in this process; `ended` says that it is no more."""
        owner = cls(_machine(), os.getpid(), _started(os.getpid()) or "", uuid4().hex[:8])
        _ALIVE.add(owner.token)
        return owner

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Read what `str` gives; None where it is something else."""
        parts = text.split("/")
        if len(parts) != 4 or not parts[1].isdigit():
            return None
        return cls(parts[0], int(parts[1]), parts[2], parts[3])

    def __str__(self) -> str:
        """Return the owner as one word, without the machine's name."""
        return f"{self.machine}/{self.pid}/{self.started}/{self.token}"

    def ended(self) -> None:
        """Take note that the command is over while the process goes on."""
        _ALIVE.discard(self.token)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; of other machines' processes nothing is known."""
        if self.machine != _machine():
            return False
        if self.pid == os.getpid() and self.started == (_started(self.pid) or ""):
            return self.token not in _ALIVE
        return _started(self.pid) != self.started


def _machine() -> str:
    """Return a digest of host, boot and process space: within it process numbers mean the same."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\x1f".join(facts).encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """Return when a process started, or None where there is no such process any more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists() or not psutil.pid_exists(pid):
            return None
        return ""  # no /proc here
    return None if fields[0] in "ZX" else fields[19]
