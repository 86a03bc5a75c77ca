"""Methods that choose both ranks and initial weights; either can be switched off.

A study can so separate the two: `eva` beside `eva:init=default` (its ranks alone) and
`eva:ranks=uniform` (its initial weights alone); the same for `gora`.
"""

from __future__ import annotations

from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits

RANKS = Limits(choices=("own", "uniform"))
INIT = Limits(choices=("own", "default"))


def check_choices(name: str, ranks: str, init: str) -> None:
    """Refuse what is plain uniform; raises ConfigError."""
    if (ranks, init) == ("uniform", "default"):
        raise ConfigError(f"{name}:ranks=uniform,init=default is plain uniform; name that instead.")


def label_of(rank: int, ranks: str, init: str) -> str:
    """Return `r8`, with what is switched off."""
    own = f"r{rank}" + ("" if ranks == "own" else "-uniform_ranks")
    return own + ("" if init == "own" else "-default_init")
