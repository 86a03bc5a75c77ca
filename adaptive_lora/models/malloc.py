"""The C library's memory: keep freed pages instead of giving them back after every operation.

A training step on a CPU allocates and frees hundreds of tensors of megabytes. glibc takes each from
the system and returns it, so the system clears the same pages again and again.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Parameters of mallopt(3), as in glibc's malloc.h."""
_PAD = 64 * 2**20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for later use; return whether the C library can.

    Resident memory then stays at its peak. Only glibc is asked (Linux, not Alpine's musl).
    """
    return _told((_MMAP_MAX, 0), (_TOP_PAD, _PAD), (_TRIM_THRESHOLD, 2**31 - 1))


def give_freed_memory_back() -> bool:
    """Take each tensor from the system and return it at once; return whether the C library can.

    Resident memory is then what is in use. By itself glibc puts tensors of up to 32 MB into one
    heap, which comes to twice that with gradient checkpointing.
    """
    return _told((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 2**20))


def release_freed_memory() -> None:
    """Give back once what has been freed, whatever is kept from here on; glibc alone does so."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _told(*values: tuple[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in values])
