"""Adapter sites: linear layers of the base that can take an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Role of a linear layer inside its block."""

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
    """Part of the block that takes adapters."""

    ALL = "all"
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


ATTENTION_ROLES = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.OUTPUT})
FEED_FORWARD_ROLES = frozenset({Role.UP, Role.GATE, Role.DOWN})


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSite:
    """One linear layer that can take an adapter."""

    name: str
    """Full module name inside the base model, such as `transformer.h.0.attn.c_attn`."""
    layer: int
    """Index of the block that holds it, from 0 at its tower's input."""
    role: Role
    in_features: int
    out_features: int
    tower: str = ""
    """Name of the stack of blocks that holds it, such as `encoder` or `vision_tower`; empty where
    the model has only one. Layer indices of different towers are unrelated."""
    packable: bool = True
    """Storage in a 4-bit base: 4 bit if true; some architectures keep certain layers as saved (T5)."""

    @property
    def parameters_per_rank(self) -> int:
        """Number of parameters of one rank: a row of A (in) and a column of B (out)."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """Maximum rank of B·A: the smaller side of the weight."""
        return min(self.in_features, self.out_features)
