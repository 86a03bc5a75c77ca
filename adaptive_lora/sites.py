"""Adapter sites: the linear maps of a model that can take a low-rank adapter.

A role is what a map does in its block, not what its module is called: in GPT-2 `c_proj` stands
both in attention and in the feed-forward part. Names are resolved with the parent module
(`attn.c_proj`, `mlp.c_proj`), and every site is addressed by its full module name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from adaptive_lora.errors import ModelError, unknown_name

if TYPE_CHECKING:
    from torch import nn


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

# Module-name endings of the supported architectures, most specific first. BERT's two `output.dense`
# (attention output and feed-forward down) differ only in the parent, hence the longer patterns.
_ROLE_PATTERNS: tuple[tuple[str, Role], ...] = (
    (r"attn\.c_attn|query_key_value|Wqkv|qkv_proj|in_proj_qkv", Role.QKV),
    (r"(attn|attention)\.(c_proj|dense|out_proj|o_proj)", Role.OUTPUT),
    (r"attention\.output\.dense|self_attention\.dense|attention\.out_lin", Role.OUTPUT),
    (r"(Self|EncDec)Attention\.o|self_attn\.(dense|out_proj|o_proj)", Role.OUTPUT),
    (r"q_proj|q_lin|query|query_proj|Attention\.q", Role.QUERY),
    (r"k_proj|k_lin|key|key_proj|Attention\.k", Role.KEY),
    (r"v_proj|v_lin|value|value_proj|Attention\.v", Role.VALUE),
    (r"out_proj|o_proj", Role.OUTPUT),
    (r"gate_proj|wi_0", Role.GATE),
    (r"mlp\.c_fc|dense_h_to_4h|fc1|up_proj|intermediate\.dense|lin1|wi_1|wi|gate_up_proj", Role.UP),
    (r"mlp\.c_proj|dense_4h_to_h|fc2|down_proj|output\.dense|lin2|wo", Role.DOWN),
)
_ROLES = tuple(
    (re.compile(rf"(?:.*[._])?(?:{pattern})$"), role) for pattern, role in _ROLE_PATTERNS
)
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSite:
    """One linear map that can take an adapter."""

    name: str
    """Full module name inside the base model, such as `transformer.h.0.attn.c_attn`."""
    layer: int
    """Index of the block that holds it, from 0 at the input."""
    role: Role
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        """What one rank costs: a row of A (in) and a column of B (out)."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """Rank above which B·A cannot gain rank: the smaller side of the map."""
        return min(self.in_features, self.out_features)


def find_sites(model: nn.Module) -> tuple[AdapterSite, ...]:
    """Return all adapter sites of a model in module order; works on meta-device models too.

    Raises:
        ModelError: no linear map inside a numbered block was found.
    """
    sites = tuple(
        AdapterSite(
            name=name, layer=layer, role=role_of(name), in_features=fan[0], out_features=fan[1]
        )
        for name, module in model.named_modules()
        if (layer := _layer_of(name)) is not None and (fan := _linear_features(module)) is not None
    )
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no adaptable site: required linear maps (Linear or GPT-2 "
            "Conv1D) inside numbered blocks such as `h.0`; use a transformer model."
        )
    return sites


def role_of(name: str) -> Role:
    """Return the role that a module's name says it has, or `other`."""
    for pattern, role in _ROLES:
        if pattern.match(name):
            return role
    return Role.OTHER


def select_sites(
    sites: Iterable[AdapterSite], placement: Placement, target_names: Sequence[str] = ()
) -> tuple[AdapterSite, ...]:
    """Keep the sites of a placement and, where given, those whose last name part is listed.

    Raises:
        ModelError: a target name matches no site, or nothing is left.
    """
    everything = tuple(sites)
    endings = {site.name.rsplit(".", 1)[-1] for site in everything}
    for target in target_names:
        if target not in endings:
            raise ModelError(unknown_name("target name", target, endings))
    families = {
        Placement.ALL: frozenset(Role),
        Placement.ATTENTION: ATTENTION_ROLES,
        Placement.FEED_FORWARD: FEED_FORWARD_ROLES,
    }[placement]
    kept = tuple(
        site
        for site in everything
        if site.role in families
        and (not target_names or site.name.rsplit(".", 1)[-1] in target_names)
    )
    if not kept:
        raise ModelError(
            f"no site left: placement '{placement}' with target names "
            f"{list(target_names) or 'any'} selects none of {len(everything)} sites."
        )
    return kept


def _layer_of(name: str) -> int | None:
    match = _LAYER_INDEX.search(f".{name}.")
    return int(match.group(1)) if match else None


def _linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out), or None for what is no linear map. Conv1D keeps its weight as (in, out)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None
