"""The only source of randomness: independent streams keyed by seed, purpose and name.

A stream depends on nothing but its key, so adding a method, site or seed to a study never shifts
the numbers that another trial draws (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit key for one stream: SHA-256 over the seed and the parts of the purpose."""
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the NumPy generator of one stream, such as `rng_for(3, "order", epoch)`."""
    return np.random.Generator(np.random.Philox(stream_key(seed, *purpose)))


@contextmanager
def torch_stream(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run the block on torch's global generators seeded for one stream; restore them afterwards.

    Needed where a library draws from the global state (the base model's own dropout).
    """
    import torch

    devices: list[torch.device | int] = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    )
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream_key(seed, *purpose))
        yield
