"""Shared options of methods that choose both ranks and initial weights; either can be switched off.

A study can separate the two effects: `eva`, `eva:init=default` (its ranks alone) and
`eva:ranks=uniform` (its initial weights alone); likewise for `gora`.
"""

from __future__ import annotations

from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits

RANKS = Limits(choices=("own", "uniform"))
INIT = Limits(choices=("own", "default"))


def check_choices(name: str, ranks: str, init: str) -> None:
    """Raise ConfigError for options that make plain uniform."""
    if (ranks, init) == ("uniform", "default"):
        raise ConfigError(f"{name}:ranks=uniform,init=default is plain uniform; name that instead.")


def label_of(rank: int, ranks: str, init: str) -> str:
    """Return `r8`, with the parts that are switched off."""
    own = f"r{rank}" + ("" if ranks == "own" else "-uniform_ranks")
    return own + ("" if init == "own" else "-default_init")
