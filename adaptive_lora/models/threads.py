"""Threads on a shared machine: idle ones sleep soon, and concurrent processes share the cores."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SPINS = "10000"
"""Rounds for which an idle thread of GNU OpenMP looks for work before it sleeps.

Its own choice, some milliseconds, costs many times the run time where other programs want the cores
(`benchmarks/shared_machine.py`)."""
_SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_inside = threading.Lock()
"""Held while this process is in a block of `shared_cores`."""


def bound_spinning() -> None:
    """Let idle threads sleep soon; effective before torch is loaded, and unless the user has set it."""
    if "torch" not in sys.modules and not any(name in os.environ for name in _SPINNING):
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def shared_cores() -> Iterator[None]:
    """Use this process's share of torch's threads inside the block.

    The share is computed at the start and kept, because the number of threads affects rounding.
    Processes of this user count while they are inside such a block. If OMP_NUM_THREADS or
    MKL_NUM_THREADS is set, the user's number of threads is used. Trials trained together in one
    process have one share.
    """
    if any(name in os.environ for name in _COUNT) or not _inside.acquire(blocking=False):
        yield
        return
    import torch

    own = torch.get_num_threads()
    try:
        with _presence() as others:
            torch.set_num_threads(max(1, own // (1 + others)))
            yield
    finally:
        torch.set_num_threads(own)
        _inside.release()


@contextmanager
def _presence() -> Iterator[int]:
    """Register this process inside the block; yield the number of other registered processes.

    Each process locks a file of its own; the system releases the lock when the process ends in any way.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"adaptive-lora-threads-{getpass.getuser()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder / str(os.getpid())
        lock = FileLock(mine, thread_local=False)
        lock.acquire(timeout=1)  # another process may be checking it
        others = sum(_is_held(path) for path in folder.iterdir() if path != mine)
    except (OSError, KeyError, Timeout):  # nothing can be written, or the user id has no name
        yield 0
        return
    try:
        yield others
    finally:
        with suppress(OSError):
            mine.unlink()
        lock.release()


def _is_held(path: Path) -> bool:
    """Return whether a living process has locked a file; remove it otherwise."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # just removed, or another user's
        return False
    with suppress(OSError):
        path.unlink()
    lock.release()
    return False
