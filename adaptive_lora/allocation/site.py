"""Adapter sites: linear layers of the base that can take an adapter, and the selection of those that do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adaptive_lora.errors import ModelError, unknown_name


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
    frozen_a: bool = False
    """Mark of a site whose A is not trained (LoRA-FA), so that a rank costs its column of B alone."""
    experts: int = 0
    """Number of routed experts whose weights this 3-D parameter stacks; 0: the site is a linear layer."""
    active: int = 1
    """Number of experts that a token runs through; 1 for a linear layer."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterSite:
        """Read a site from JSON values with its fields; others are not read.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of the wrong type.
        """
        return cls(
            name=str(values["name"]),
            layer=int(values["layer"]),
            role=Role(values["role"]),
            in_features=int(values["in_features"]),
            out_features=int(values["out_features"]),
            tower=str(values.get("tower", "")),
            packable=bool(values.get("packable", True)),
            frozen_a=bool(values.get("frozen_a", False)),
            experts=int(values.get("experts", 0)),
            active=int(values.get("active", 1)),
        )

    @property
    def matrices(self) -> int:
        """Number of weight matrices: 1, or one per expert."""
        return max(1, self.experts)

    @property
    def parameters_per_rank(self) -> int:
        """Number of trained parameters of one rank: a row of A, unless frozen, and a column of B of every matrix."""
        return self.matrices * (self.out_features + (0 if self.frozen_a else self.in_features))

    def equal_rank(self, rank: int) -> int:
        """Return the rank that equals rank `rank` of a linear layer: routed experts divide it.

        With k of the experts active, rank r / k at each gives a token an update of rank r at most ("LoRA Without
        Regret", Schulman et al. 2025; PEFT pull request 3007).
        """
        return max(1, rank // self.active)

    @property
    def max_rank(self) -> int:
        """Maximum rank of B·A: the smaller side of the weight."""
        return min(self.in_features, self.out_features)


LAYER_PARTS: Mapping[str, tuple[int, int]] = {
    "first-half": (0, 2),
    "last-half": (1, 2),
    "first-third": (0, 3),
    "middle-third": (1, 3),
    "last-third": (2, 3),
}
"""Name of a part of a tower's depth -> (index, number n of equal parts); layer i of L is in part i·n // L."""
_LAYERS = re.compile(r"\d+(-\d+)?|" + "|".join(LAYER_PARTS))
_FUSED = frozenset({Role.QUERY, Role.KEY, Role.VALUE})


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteChoice:
    """Criteria that select sites of a model; a site must meet all of them."""

    placement: Placement = Placement.ALL
    roles: tuple[str, ...] = ()
    """Allowed roles; empty: any."""
    layers: tuple[str, ...] = ()
    """Layers `7`, ranges `0-11` (both ends included) and names of `LAYER_PARTS`; empty: all."""
    target_names: tuple[str, ...] = ()
    """Last components of module names; empty: any."""
    towers: tuple[str, ...] = ()
    """Towers, or parts of their names such as `vision`; empty: all."""


def layers_problem(layers: Sequence[str]) -> str | None:
    """Return what is wrong with how layers are written, or None."""
    for item in layers:
        first, _, last = item.partition("-")
        backwards = first.isdigit() and last.isdigit() and int(first) > int(last)
        if backwards or not _LAYERS.fullmatch(item):
            return (
                "layers must be numbers from 0, ranges such as 0-11 or "
                f"{', '.join(LAYER_PARTS)}, joined by '+'; got '{item}'"
            )
    return None


def select_sites(sites: Iterable[AdapterSite], choice: SiteChoice | None = None) -> tuple[AdapterSite, ...]:
    """Keep the sites of a choice, in their order.

    Raises:
        ModelError: a criterion matches no site, or no site meets all of them.
    """
    everything, choice = tuple(sites), choice or SiteChoice()
    if choice == SiteChoice():
        return everything
    _require_names(everything, choice.target_names)
    _require_roles(everything, choice.roles)
    _require_towers(everything, choice.towers)
    deepest = max(site.layer for site in everything)
    for item in choice.layers:
        if any(int(number) > deepest for number in re.findall(r"\d+", item)):
            raise ModelError(f"layers={item} goes beyond the last layer: required within 0 to {deepest}.")
    kept = tuple(site for site in everything if _chosen(site, everything, choice))
    if not kept:
        raise ModelError(f"no site left: {_described(choice)} selects none of {len(everything)} sites.")
    return kept


def _require_names(sites: Sequence[AdapterSite], names: Sequence[str]) -> None:
    endings = {site.name.rsplit(".", 1)[-1] for site in sites}
    for target in names:
        if target not in endings:
            raise ModelError(unknown_name("target name", target, endings))


def _require_roles(sites: Sequence[AdapterSite], roles: Sequence[str]) -> None:
    present = {site.role for site in sites}
    for role in map(Role, roles):
        if role in _FUSED and role not in present and Role.QKV in present:
            fused = next(site.name.rsplit(".", 1)[-1] for site in sites if site.role == Role.QKV)
            raise ModelError(
                f"this base has no site of role '{role}': one linear layer, {fused}, computes queries, keys "
                "and values together, and an adapter there changes all three; required role qkv."
            )
        if role not in present:
            raise ModelError(unknown_name("role of this base", role, present))


def _require_towers(sites: Sequence[AdapterSite], towers: Sequence[str]) -> None:
    present = {site.tower for site in sites} - {""}
    for tower in towers:
        if not present:
            raise ModelError(f"towers={tower}: this base has one stack of blocks, not several.")
        if not any(tower in name for name in present):
            raise ModelError(unknown_name("tower of this base", tower, present))


def _chosen(site: AdapterSite, sites: Sequence[AdapterSite], choice: SiteChoice) -> bool:
    family = {
        Placement.ALL: frozenset(Role),
        Placement.ATTENTION: ATTENTION_ROLES,
        Placement.FEED_FORWARD: FEED_FORWARD_ROLES,
    }[choice.placement]
    return (
        site.role in family
        and (not choice.towers or any(part in site.tower for part in choice.towers))
        and (not choice.roles or site.role in choice.roles)
        and (not choice.target_names or site.name.rsplit(".", 1)[-1] in choice.target_names)
        and (not choice.layers or any(_in_layers(site, sites, item) for item in choice.layers))
    )


def _in_layers(site: AdapterSite, sites: Sequence[AdapterSite], item: str) -> bool:
    if item in LAYER_PARTS:
        part, parts = LAYER_PARTS[item]
        depth = 1 + max(other.layer for other in sites if other.tower == site.tower)
        return site.layer * parts // depth == part
    first, _, last = item.partition("-")
    return int(first) <= site.layer <= int(last or first)


def _described(choice: SiteChoice) -> str:
    parts = [f"placement '{choice.placement}'"]
    for name in ("towers", "roles", "layers", "target_names"):
        if getattr(choice, name):
            parts.append(f"{name} {'+'.join(getattr(choice, name))}")
    return " with ".join([parts[0], ", ".join(parts[1:]) or "target names any"])
