"""The number that methods are compared in, what of it does not matter, and what its tests are over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adaptive_lora.analysis.stats import Interval
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

    def as_loss(self, interval: Interval) -> tuple[float | None, float | None]:
        """Return the ends of a difference's interval as those of a loss, of which negative is better."""
        if not self.higher_is_better or interval.low is None or interval.high is None:
            return interval.low, interval.high
        return -interval.high, -interval.low

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Margin:
    """The largest difference in the outcome that does not matter, and its source."""

    value: float | None
    source: str


Replicate = Literal["seed", "example"]
"""The unit of inference: what tests and intervals are over, and other ones of which they speak about."""
