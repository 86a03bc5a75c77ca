"""Interruptions: signals raised where work can stop and delayed where it cannot; files that are never half written."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

PARTIAL = ".partial"
"""Infix of the name of a file or folder that is being written (`replacing`)."""


class Interrupted(KeyboardInterrupt):
    """The user, or the system, asked this process to end."""

    def __init__(self, number: int) -> None:
        """Store the signal's number."""
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code of the signal by shell convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class TrainingPaused(KeyboardInterrupt):
    """A training is to be checkpointed at this step and continued later."""


class _Held:
    """Number of open `whole` blocks, and the signal received in them."""

    depth = 0
    number: int | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on Ctrl-C and SIGTERM inside the block.

    A second signal raises again, so that a user need not wait for the checkpoint. Outside the main
    thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in wanted}
    _Held.depth, _Held.number = 0, None
    try:
        for number in wanted:
            signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if _Held.depth:
        _Held.number = number
        return
    raise Interrupted(number)


@contextmanager
def whole() -> Iterator[None]:
    """Delay signals until the block ends; for blocks of a few milliseconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
        if not _Held.depth and _Held.number is not None:
            number, _Held.number = _Held.number, None
            raise Interrupted(number)


def held_signal() -> int | None:
    """Return the signal that open `whole` blocks delay, if any, and leave it to the caller."""
    number, _Held.number = _Held.number, None
    return number


def ignore_signals() -> None:
    """Ignore further signals until the block of `interruptible` ends: a launcher repeats Ctrl-C by SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file or folder atomically: the block makes it under another name, and at its end it is renamed.

    Before that it is flushed to disk. After an error nothing of it is left; a process that is killed leaves
    a partial one for `remove_partial`. An existing file is replaced; an existing folder must be empty.

    Args:
        target: path of the file or folder; missing folders above it are created.

    Yields:
        The path, in the same folder, at which the block makes it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{PARTIAL}-{uuid4().hex}")
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        partial.replace(target)
        _flush(target.parent)
    finally:
        remove_partial(target.parent, partial.name)


def remove_partial(folder: Path, name: str) -> None:
    """Remove the partial files and folders whose names begin with a name, and the files SQLite keeps beside them."""
    for path in folder.glob(f"{escape(name)}*"):
        if PARTIAL in path.name and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif PARTIAL in path.name:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
