"""The only source of randomness: independent streams keyed by seed, purpose and name.

A stream depends on nothing but its key, so adding a method, site or seed to a study never shifts
the numbers that another trial draws (common random numbers).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def stream_key(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit key for one stream: SHA-256 over the seed and the parts of the purpose."""
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the NumPy generator of one stream, such as `rng_for(3, "order", epoch)`."""
    return np.random.Generator(np.random.Philox(stream_key(seed, *purpose)))


GlobalState = dict[str, Any]
"""State of every global generator: torch's on CPU and GPUs, NumPy's and Python's own."""


def global_state() -> GlobalState:
    """Return the state of the global generators, as tensors and plain values."""
    import torch

    drawn: Any = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries may draw from it)
    name, keys, *rest = drawn
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_global_state(state: GlobalState) -> None:
    """Restore the state of the global generators returned by `global_state`."""
    import torch

    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def torch_stream(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run the block on the global generators seeded for one stream; restore them afterwards.

    Needed where a library draws from the global state (the base model's own dropout).
    """
    import torch

    before, key = global_state(), stream_key(seed, *purpose)
    try:
        torch.manual_seed(key)
        np.random.seed(key % 2**32)  # noqa: NPY002
        random.seed(key)
        yield
    finally:
        set_global_state(before)
