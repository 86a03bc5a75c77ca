"""The number that methods are compared in, and what its tests are over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adaptive_lora.results import NATS_PER_TOKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The number that methods are compared in."""

    name: str = "test loss"
    unit: str = NATS_PER_TOKEN
    """Unit; empty where the name says it all, as of an accuracy."""
    higher_is_better: bool = False

    @property
    def sign(self) -> int:
        """+1 or -1, so that a difference times it is negative where the method is better."""
        return -1 if self.higher_is_better else 1

    @property
    def title(self) -> str:
        """Name with its unit, such as `test loss (nats per token)`."""
        return self.with_unit(self.name)

    @property
    def summed(self) -> str:
        """Unit of the sum over an example, such as `nats`; the name where there is no unit."""
        return self.unit.partition(" per ")[0] or self.name

    @property
    def is_loss(self) -> bool:
        """Mark of the loss that a study's trials are scored by."""
        return self.name == "test loss"

    def with_unit(self, text: str) -> str:
        """Return a text with the unit in brackets."""
        return f"{text} ({self.unit})" if self.unit else text


Replicate = Literal["seed", "example"]
"""The unit of inference: what tests and intervals are over, and other ones of which they speak about."""
