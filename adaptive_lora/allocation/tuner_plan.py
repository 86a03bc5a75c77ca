"""The plan of a method that gives no ranks: the tensors that it trains, and its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation.architecture import Shape, size
from adaptive_lora.allocation.plan import BaseStorage, RankPlan
from adaptive_lora.errors import AllocationError


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerPlan:
    """Tensors that a method without ranks trains; the audit compares the model with it."""

    method: str
    """Label of the method that made it, such as `prompt_tuning-n20`."""
    family: str
    """Type of the tuner, such as `prompt_tuning`."""
    settings: Mapping[str, Any]
    """Settings of the tuner, as JSON-ready values."""
    tensors: Mapping[str, Shape]
    """Name in the model -> shape of every trained tensor."""
    budget: int | None
    """Upper limit on trainable parameters set by the user, or None."""
    kept: Mapping[str, Shape] | None = None
    """Name -> shape of the saved adapter's tensors where they differ from the trained ones, or None."""
    positions: int = 0
    """Number of context positions taken by virtual tokens."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, in sentences."""

    @property
    def trainable_parameters(self) -> int:
        """Number of elements of all trained tensors."""
        return sum(size(shape) for shape in self.tensors.values())

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites where a type of PEFT's adapters has a part; empty for other tuners."""
        return tuple(self.settings["targets"]) if self.family == "peft" else ()

    @property
    def lora_plus(self) -> float:
        """Ratio of B's learning rate to A's: 1, because there is no B."""
        return 1.0

    @property
    def base(self) -> str:
        """Storage of the frozen base's weights: as saved, or in 4 bit where the settings say so."""
        return str(self.settings.get("base", BaseStorage.FULL))

    def lr_multipliers(self) -> dict[str, float]:
        """Return site name -> factor of its learning rate: empty, because there are no sites."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; `read_plan` reads them back."""
        return {
            "method": self.method,
            "family": self.family,
            "budget": self.budget,
            "trainable_parameters": self.trainable_parameters,
            "settings": dict(self.settings),
            "positions": self.positions,
            "notes": list(self.notes),
            "tensors": _listed(self.tensors),
            "kept": None if self.kept is None else _listed(self.kept),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TunerPlan:
        """Read a plan written by `to_dict`.

        Raises:
            AllocationError: a field is missing, of the wrong type, or contradicts another.
        """
        try:
            plan = cls(
                method=str(values["method"]),
                family=str(values["family"]),
                settings=dict(values["settings"]),
                tensors=_read(values["tensors"]),
                budget=None if values["budget"] is None else int(values["budget"]),
                kept=None if values["kept"] is None else _read(values["kept"]),
                positions=int(values["positions"]),
                notes=tuple(str(note) for note in values["notes"]),
            )
            stated = int(values["trainable_parameters"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AllocationError(
                f"not a plan: {type(error).__name__} {error}; required the JSON that "
                "`adaptive-lora plan --json` writes."
            ) from error
        if stated != plan.trainable_parameters:
            raise AllocationError(
                f"plan contradicts itself: its total is {stated:,} trainable parameters, its tensors "
                f"add up to {plan.trainable_parameters:,}."
            )
        return plan

    def to_json(self) -> str:
        """Return the plan as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1)


Plan = RankPlan | TunerPlan
"""The plan of any method."""


def read_plan(values: Mapping[str, Any]) -> Plan:
    """Read any plan back from its JSON values.

    Raises:
        AllocationError: the values are not those of a plan.
    """
    return TunerPlan.from_dict(values) if "family" in values else RankPlan.from_dict(values)


def _listed(tensors: Mapping[str, Shape]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(shape)} for name, shape in tensors.items()]


def _read(rows: Any) -> dict[str, Shape]:
    return {str(row["name"]): tuple(int(side) for side in row["shape"]) for row in rows}
