"""Scale policies: how alpha and rank become the factor of a site's update."""

from __future__ import annotations

import math
from enum import StrEnum

REFERENCE_RANK = 16
"""Rank at which every policy gives the update the same factor, the study's `scale`."""


class ScalePolicy(StrEnum):
    """The factor of B·A as a function of rank; all agree at `REFERENCE_RANK`.

    Under Adam only `constant_alpha_over_r` keeps rank and step size apart: there the first update
    of B·A has about the same size at every rank.
    """

    CONSTANT_ALPHA_OVER_R = "constant_alpha_over_r"
    """alpha = scale·rank at each site; the factor alpha / rank is `scale` everywhere."""
    RSLORA = "rslora"
    """One alpha, scale·sqrt(16); the factor alpha / sqrt(rank) falls with the root of the rank
    (Kalajdzievski 2023, 2312.03732; PEFT's `use_rslora`)."""
    CONSTANT_ALPHA = "constant_alpha"
    """One alpha, scale·16; the factor alpha / rank falls with rank (PEFT's `rank_pattern`
    alone)."""

    def alpha(self, scale: float, rank: int) -> float:
        """Return the alpha of a site."""
        if self is ScalePolicy.CONSTANT_ALPHA_OVER_R:
            return scale * rank
        if self is ScalePolicy.RSLORA:
            return scale * math.sqrt(REFERENCE_RANK)
        return scale * REFERENCE_RANK

    def effective(self, alpha: float, rank: int) -> float:
        """Return the factor that B·A is multiplied by."""
        return alpha / (math.sqrt(rank) if self is ScalePolicy.RSLORA else rank)

    @property
    def formula(self) -> str:
        """The factor in words."""
        return "alpha / sqrt(rank)" if self is ScalePolicy.RSLORA else "alpha / rank"
