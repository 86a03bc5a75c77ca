"""Python's cyclic garbage collector, kept from work that it cannot help; needs no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def modules_uncollected() -> Iterator[None]:
    """Keep what is in memory out of garbage collections for the block.

    Memory is freed after every trial, and a collection that goes through all imported modules takes half a second.
    """
    if gc.get_freeze_count():  # the program's own, which `unfreeze` would end
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def without_collector() -> Iterator[None]:
    """Switch the collector off inside the block, for making many objects of which none is garbage before its end.

    Repeated collections cost more per object the more objects exist.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
