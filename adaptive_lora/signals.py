"""Ctrl-C and SIGTERM: raised where work can be interrupted, delayed where it cannot."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


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
