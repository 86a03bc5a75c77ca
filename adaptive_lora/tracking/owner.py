"""The owner of a lease, and the check whether its process has ended."""

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
