"""Certificate of optimality of a solver's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from adaptive_lora.options import parse_value

_ROUNDING = 1e-9
"""Relative difference of two gains that counts as none."""
_LATER = ("everything", "covering_rank")
"""Fields that plans of earlier versions lack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Gain of ranks by the spectra that they were computed from, and its upper bound.

    All gains are in the unit of the spectra (nats for `whitened_gradient`). They are predictions of
    a separable model of the loss; only training shows whether it holds.
    """

    metric: str
    """Importance metric that gave the spectra."""
    captured: float
    """Gain of the planned ranks: the sum over sites of the spectrum up to the rank."""
    bound: float
    """Upper bound of the gain of any integer ranks within budget and limits (linear relaxation)."""
    optimal: bool
    """Proof that the ranks found are the best integer ranks; planned unless abstained."""
    best: float
    """Gain of the best ranks found; equals `captured` unless abstained."""
    uniform: float
    """Gain of uniform ranks under the same budget and limits."""
    idle_parameters: int = 0
    """Number of parameters for which the spectra predict no gain; they are spread evenly."""
    replicates: int = 0
    """Number of repeated measurements of the spectra."""
    headroom_lower: float | None = None
    """5 % quantile of the cross-fitted headroom over replicates; None with fewer than two replicates."""
    threshold: float | None = None
    """Headroom, as a share, below which uniform ranks are planned instead; None: never."""
    everything: float | None = None
    """Gain of all components, whatever their cost; None in plans of earlier versions."""
    covering_rank: int | None = None
    """Least uniform rank that covers every component with a gain; None in plans of earlier versions."""

    @property
    def gap(self) -> float:
        """Maximum gain that other ranks could have beyond the best ones found."""
        return 0.0 if self.optimal else max(0.0, self.bound - self.best)

    @property
    def headroom(self) -> float:
        """Predicted gain over uniform ranks, as a share of theirs: (best - uniform) / uniform."""
        return (self.best - self.uniform) / self.uniform

    @property
    def abstained(self) -> bool:
        """Mark of uniform ranks, planned because the headroom was too small or too uncertain."""
        return (
            self.threshold is not None
            and self.headroom_lower is not None
            and min(self.headroom, self.headroom_lower) < self.threshold
        )

    @property
    def reason(self) -> str:
        """Reason why no other ranks are planned to gain more than uniform's; empty where some are."""
        if self.abstained:
            return f"abstained: the headroom is below the threshold of {self.threshold:.2%}"
        if self.everything is None or self.best > self.uniform * (1 + _ROUNDING):
            return ""
        if self.uniform >= self.everything * (1 - _ROUNDING):
            what = "above the noise edge" if self.metric == "whitened_gradient" else "with a gain"
            return f"nothing measured beyond uniform: every component {what} is covered by rank {self.covering_rank}"
        share = f"uniform captures {self.uniform / self.bound:.1%} of what any allocation can"
        return f"proven optimal: {share}" if self.optimal else f"no better ranks found: {share}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `from_dict` reads the fields back."""
        derived: dict[str, Any] = {"gap": self.gap, "headroom": self.headroom, "abstained": self.abstained}
        derived["reason"] = self.reason
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Read what `to_dict` wrote; missing or unreadable fields raise KeyError or ValueError."""
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if name in values or name not in _LATER}
        return cls(**{name: parse_value(kind, values[name]) for name, kind in kinds.items()})

    def sentences(self) -> list[str]:
        """Return the certificate as text, one fact per line."""
        proof = "proved optimal" if self.optimal else f"at most {self.gap / self.bound:.2%} short"
        lines = [
            f"predicted  {self.best:.6g} captured of at most {self.bound:.6g}, {proof}; uniform {self.uniform:.6g}",
            f"headroom   {self.headroom:.2%} over uniform at equal parameters"
            + (
                "; measured once, so how sure that is remains unknown"
                if self.headroom_lower is None
                else f"; {self.headroom_lower:.2%} at the 5 % quantile of {self.replicates} replicates, cross-fitted"
            ),
        ]
        if self.idle_parameters:
            lines.append(f"idle       {self.idle_parameters:,} parameters gain nothing by the spectra: spread evenly")
        if self.reason and not self.abstained:
            lines.append(f"uniform    {self.reason}")
        if self.abstained:
            lines.append(f"abstained  below the threshold of {self.threshold:.2%}, so ranks are uniform's")
        return lines
