"""IA3: activations are rescaled by learned vectors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture, Shape
from adaptive_lora.allocation.site import Role
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TrainedTrial, TrialContext, TunerMethod
from adaptive_lora.methods.size_parameter import unused_note, within

_SCALED = (Role.KEY, Role.VALUE, Role.QKV)


@dataclass(frozen=True, kw_only=True)
class Ia3(TunerMethod):
    """(IA)^3 (Liu et al. 2022, 2205.05638, section 3.3): keys, values and inner activations.

    The inner activation is the input of the feed-forward part's last layer. In models that fuse
    queries with keys and values (GPT-2), the fused output is scaled, as in PEFT.
    """

    name: ClassVar[str] = "ia3"

    def label_under(self, budget: str | None) -> str:
        """Return an empty label, because there are no options."""
        return ""

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return one vector per key, value and last feed-forward layer."""
        outer = [site for site in base.sites if site.role in _SCALED]
        inner = [site for site in base.sites if site.role is Role.DOWN]
        if not outer and not inner:
            raise AllocationError(
                f"{method}: {base.kind} has no linear layer known as key, value or down; required some."
            )
        tensors: dict[str, Shape] = {f"{s.name}.ia3_l.default": (s.out_features, 1) for s in outer}
        tensors |= {f"{site.name}.ia3_l.default": (1, site.in_features) for site in inner}
        order = {f"{site.name}.ia3_l.default": at for at, site in enumerate(base.sites)}
        plan = TunerPlan(
            method=method,
            family="ia3",
            settings={
                "targets": [site.name for site in base.sites if site in outer or site in inner],
                "feed_forward": [site.name for site in inner],
            },
            tensors={name: tensors[name] for name in sorted(tensors, key=order.__getitem__)},
            budget=budget,
        )
        within(plan.trainable_parameters, budget, method)
        notes = unused_note(plan.trainable_parameters, budget, method)
        return dataclasses.replace(plan, notes=notes)

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train with PEFT's own tuner."""
        from adaptive_lora.methods.adapters.peft_tuner import fit_peft_tuner

        return fit_peft_tuner(trial)
