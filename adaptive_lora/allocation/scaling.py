"""Scaling policies: how alpha and rank become the factor of a site's update B·A."""

from __future__ import annotations

import math
from enum import StrEnum

DEFAULT_ALPHA = 32.0
"""Default of LoRA's alpha."""
CONSTANT_AT = 16
"""Rank at which the factor of `constant` is alpha / rank."""
RENAMED = {"constant_alpha_over_r": "constant", "constant_alpha": "standard"}
"""Policy name of version 0.1 -> its name today."""


class Scaling(StrEnum):
    """The factor of B·A as a function of rank.

    Under Adam the first update of B·A from B = 0 is in proportion to factor x rank, so a policy
    decides whether rank is also a learning rate. `step_size` returns that product.
    """

    STANDARD = "standard"
    """One alpha, factor alpha / rank (Hu et al. 2021, 2106.09685, section 4.1; PEFT's default).
    Adam's first update has the same size at every rank."""
    RSLORA = "rslora"
    """One alpha, factor alpha / sqrt(rank) (Kalajdzievski 2023, 2312.03732; PEFT's `use_rslora`).
    Adam's first update grows with the root of the rank."""
    CONSTANT = "constant"
    """The factor alpha / 16 at every rank, so alpha grows with rank (PEFT's `alpha_pattern`).
    Adam's first update grows in proportion to rank: rank acts as a learning rate."""

    @classmethod
    def _missing_(cls, value: object) -> Scaling | None:
        """Read the names of version 0.1."""
        renamed = RENAMED.get(str(value))
        return None if renamed is None else cls(renamed)

    def alpha_at(self, alpha: float, rank: int) -> float:
        """Return the `lora_alpha` of a site.

        Args:
            alpha: alpha of the study or method; under `constant` the alpha of a site of rank 16.
            rank: rank of the site.
        """
        return alpha * rank / CONSTANT_AT if self is Scaling.CONSTANT else alpha

    def at_rank(self, alpha: float, rank: int, other: int) -> float:
        """Return the `lora_alpha` that a site of this alpha and rank has at another rank."""
        return self.alpha_at(alpha / self.alpha_at(1.0, rank), other)

    def factor(self, alpha: float, rank: int) -> float:
        """Return the factor that B·A is multiplied by at a site of this `lora_alpha` and rank."""
        return alpha / (math.sqrt(rank) if self is Scaling.RSLORA else rank)

    def step_size(self, alpha: float, rank: int) -> float:
        """Return factor x rank at a site of this `lora_alpha`, which Adam's update grows with."""
        return self.factor(alpha, rank) * rank

    @property
    def formula(self) -> str:
        """The factor as a formula in text."""
        return {
            Scaling.STANDARD: "alpha / rank",
            Scaling.RSLORA: "alpha / sqrt(rank)",
            Scaling.CONSTANT: f"alpha / {CONSTANT_AT} at every rank",
        }[self]
