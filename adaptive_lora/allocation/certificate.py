"""Certificate of optimality of a solver's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from adaptive_lora.options import parse_value


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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `from_dict` reads the fields back."""
        derived = {"gap": self.gap, "headroom": self.headroom, "abstained": self.abstained}
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Read what `to_dict` wrote; missing or unreadable fields raise KeyError or ValueError."""
        return cls(**{name: parse_value(kind, values[name]) for name, kind in get_type_hints(cls).items()})

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
        if self.abstained:
            lines.append(f"abstained  below the threshold of {self.threshold:.2%}, so ranks are uniform's")
        return lines
