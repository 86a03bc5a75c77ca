"""Number of components per site that a profile tells from noise, and the uniform rank that covers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaptive_lora.methods.importance.contract import Measurement, SiteMeasure

EDGED = ("whitened_gradient",)
"""Metrics whose spectra count only what is above a noise edge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Components above the noise edge from some of the calibration examples."""

    examples: int
    components: int
    """Number of components of all sites."""
    rank: int
    """Least uniform rank that covers them all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visible:
    """Components above the noise edge from all calibration examples and from each half of them.

    The edge is the largest singular value of half the difference of the halves' whitened gradients, which is noise
    alone (`whitened_gradient`). From half the examples the noise has twice the variance, and so has its edge. The
    first component of noise is above the edge of another draw of it at every second site, so that a site with one
    component may have none.
    """

    components: Mapping[str, int]
    """Site name -> number of components above the edge from all examples."""
    whole: Seen
    halves: tuple[Seen, ...]

    @property
    def settled(self) -> int | None:
        """Number of examples from which on the covering rank stayed the same; None: still changing."""
        if not self.halves or any(half.rank != self.whole.rank for half in self.halves):
            return None
        return min(half.examples for half in self.halves)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `from_dict` reads the fields back."""
        return {**asdict(self), "settled": self.settled}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Visible:
        """Read what `to_dict` wrote; missing or unreadable fields raise KeyError, TypeError or ValueError."""

        def seen(row: Mapping[str, Any]) -> Seen:
            return Seen(**{name: int(row[name]) for name in Seen.__slots__})

        return cls(
            components={str(name): int(count) for name, count in values["components"].items()},
            whole=seen(values["whole"]),
            halves=tuple(seen(row) for row in values["halves"]),
        )

    def sentence(self) -> str:
        """Return the counts as one sentence."""
        some = sum(count > 0 for count in self.components.values())
        text = (
            f"{self.whole.components:,} components above the noise edge at {some:,} of {len(self.components):,} sites; "
            f"uniform rank {self.whole.rank} covers them all"
        )
        if not self.halves:
            return text
        before = " and ".join(str(half.rank) for half in self.halves)
        if self.settled is not None:
            return f"{text}, as with {self.settled} of {self.whole.examples} examples"
        return f"{text} (rank {before} with half of the examples: still changing at {self.whole.examples} examples)"


def visible(metric: str, measured: Measurement, examples: int) -> Visible | None:
    """Return the components above the noise edge; None for metrics without one.

    Args:
        metric: name of the metric.
        measured: its measurement.
        examples: number of calibration examples.
    """
    if metric not in EDGED:
        return None
    sizes: Sequence[int] = (examples - examples // 2, examples // 2)
    return Visible(
        components={name: _count(measure) for name, measure in measured.whole.items()},
        whole=_seen(measured.whole, examples),
        halves=tuple(_seen(half, size) for half, size in zip(measured.halves, sizes, strict=True)),
    )


def _seen(measures: Mapping[str, SiteMeasure], examples: int) -> Seen:
    counts = [_count(measure) for measure in measures.values()]
    return Seen(examples=examples, components=sum(counts), rank=max(counts, default=0))


def _count(measure: SiteMeasure) -> int:
    return sum(value > 0 for value in measure.spectrum)
