"""What an adapter site is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a linear map does inside its block."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    QKV = "qkv"
    OUTPUT = "output"
    UP = "up"
    GATE = "gate"
    DOWN = "down"
    OTHER = "other"


class Placement(StrEnum):
    """Which part of the block takes adapters."""

    ALL = "all"
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


ATTENTION_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.OUTPUT})
FEED_FORWARD_ROLES = frozenset({Role.UP, Role.GATE, Role.DOWN})


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSite:
    """One linear map that can take an adapter."""

    name: str
    """Full module name inside the base model, such as `transformer.h.0.attn.c_attn`."""
    layer: int
    """Index of the block that holds it, from 0 at its tower's input."""
    role: Role
    in_features: int
    out_features: int
    tower: str = ""
    """Which stack of blocks it is in, such as `encoder` or `vision_tower`; empty where the model
    has only one. Layers of different towers are not neighbours."""
    packable: bool = True
    """Whether a 4-bit base holds it in 4 bit; some architectures keep maps as they are (T5)."""

    @property
    def parameters_per_rank(self) -> int:
        """What one rank costs: a row of A (in) and a column of B (out)."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """Rank above which B·A cannot gain rank: the smaller side of the map."""
        return min(self.in_features, self.out_features)
