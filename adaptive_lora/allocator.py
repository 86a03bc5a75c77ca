"""The C library's memory: keep freed pages instead of giving them back after every operation.

A training step on a CPU allocates and frees hundreds of tensors of megabytes. glibc takes each from
the system and returns it, so the system clears the same pages again and again.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3), as in glibc's malloc.h."""
_PAD = 64 * 2**20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for later use; return whether the C library can.

    Resident memory then stays at its peak. Only glibc is asked (Linux, not Alpine's musl).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    values = ((_MMAP_MAX, 0), (_TOP_PAD, _PAD), (_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(parameter, value) == 1 for parameter, value in values])
