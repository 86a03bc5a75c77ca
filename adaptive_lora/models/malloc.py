"""Settings of the C library's allocator: keep freed pages instead of returning them after every operation.

A training step on a CPU allocates and frees hundreds of tensors of megabytes. By default glibc takes
each from the system and returns it, so that the system clears the same pages again and again.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Parameters of mallopt(3), as in glibc's malloc.h."""
_PAD = 64 * 2**20
"""Minimum growth of the heap, in bytes."""


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for later use; return whether the C library supports it.

    Resident memory then stays at its peak. Only glibc supports it (Linux, not Alpine's musl).
    """
    return _told((_MMAP_MAX, 0), (_TOP_PAD, _PAD), (_TRIM_THRESHOLD, 2**31 - 1))


def give_freed_memory_back() -> bool:
    """Return each freed tensor to the system at once; return whether the C library supports it.

    Resident memory is then the memory in use. By default glibc puts tensors of up to 32 MB into one
    heap, which takes twice the memory with gradient checkpointing.
    """
    return _told((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 2**20))


def release_freed_memory() -> None:
    """Return all memory freed so far to the system, once; glibc only."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _told(*values: tuple[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in values])
