"""IA3: activations are rescaled by learned vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture, Shape
from adaptive_lora.allocation.site import Role
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TunerMethod

_SCALED = (Role.KEY, Role.VALUE, Role.QKV)


@dataclass(frozen=True, kw_only=True)
class Ia3(TunerMethod):
    """(IA)^3 (Liu et al. 2022, 2205.05638, section 3.3): keys, values and inner activations.

    The inner activation is the input of the feed-forward part's last layer. In models that fuse
    queries with keys and values (GPT-2), the fused output is scaled, as in PEFT.
    """

    name: ClassVar[str] = "ia3"
    divided_base: ClassVar[bool] = True

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return one vector per key, value and last feed-forward layer."""
        targets = [site for site in base.sites if site.role in (*_SCALED, Role.DOWN)]
        if not targets:
            raise AllocationError(
                f"{method}: {base.kind} has no linear layer known as key, value or down; required some."
            )
        tensors: dict[str, Shape] = {
            f"{site.name}.ia3_l.default": (1, site.in_features) if site.role is Role.DOWN else (site.out_features, 1)
            for site in targets
        }
        settings = {
            "targets": [site.name for site in targets],
            "feed_forward": [site.name for site in targets if site.role is Role.DOWN],
        }
        return TunerPlan(method=method, family=self.name, settings=settings, tensors=tensors, budget=budget)
