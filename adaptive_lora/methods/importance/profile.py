"""The importance profile: measured importance of each site, with the settings of the measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation import ProfileSummary
from adaptive_lora.errors import AllocationError

Spectra = Mapping[str, tuple[float, ...]]
"""Site name -> gain of its first, second ... rank, not increasing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceProfile:
    """Scores, and spectra if the metric has them, of one metric on one training split."""

    metric: str
    scores: Mapping[str, float]
    """Site name -> score, at least 0; only ratios between sites have a meaning."""
    spectra: Spectra | None = None
    """Spectra of at most 256 components per site, in the metric's own unit; None for metrics without a spectrum."""
    replicates: tuple[Spectra, ...] = ()
    """Spectra on every second calibration example, once from the first and once from the second; for
    metrics without spectra the score as one component. Empty for metrics without data."""
    tokens: int
    """Number of supervised calibration tokens."""
    processed_tokens: int = 0
    """Number of tokens run through the model for the measurement, without padding and including training."""
    seconds: float
    seed: int
    stability: float
    """Spearman correlation between the scores of the two halves of the calibration examples; NaN
    where undefined. Low values mean that the ranking is mostly noise."""
    stability_note: str = ""
    """Reason why the stability is undefined; empty otherwise."""

    def summary(self) -> ProfileSummary:
        """Return the values that methods use to allocate ranks."""
        return ProfileSummary(metric=self.metric, scores=self.scores, spectra=self.spectra, replicates=self.replicates)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; an undefined stability is None."""
        return {
            "metric": self.metric,
            "scores": dict(self.scores),
            "spectra": None if self.spectra is None else _lists(self.spectra),
            "replicates": [_lists(spectra) for spectra in self.replicates],
            "tokens": self.tokens,
            "processed_tokens": self.processed_tokens,
            "seconds": self.seconds,
            "seed": self.seed,
            "stability": None if math.isnan(self.stability) else self.stability,
            "stability_note": self.stability_note,
        }

    def to_json(self) -> str:
        """Return the profile as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ImportanceProfile:
        """Read a profile written by `to_json`.

        Raises:
            AllocationError: the text is not an importance profile.
        """
        try:
            values = json.loads(text)
            _require_sound(values)
            stability, spectra = values["stability"], values["spectra"]
            return cls(
                metric=str(values["metric"]),
                scores={str(name): float(score) for name, score in values["scores"].items()},
                spectra=None if spectra is None else _tuples(spectra),
                replicates=tuple(_tuples(spectra) for spectra in values["replicates"]),
                tokens=int(values["tokens"]),
                processed_tokens=int(values["processed_tokens"]),
                seconds=float(values["seconds"]),
                seed=int(values["seed"]),
                stability=math.nan if stability is None else float(stability),
                stability_note=str(values["stability_note"]),
            )
        except (
            KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            raise AllocationError(
                f"not an importance profile ({type(error).__name__}: {error}); required the JSON "
                "that `adaptive-lora profile` writes."
            ) from error


def _require_sound(values: Any) -> None:
    """Raise ValueError where a number is not finite or a score is below zero."""
    spectra = [values["spectra"] or {}, *values["replicates"]]
    numbers = [*values["scores"].values(), *(v for one in spectra for row in one.values() for v in row)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a score is NaN or infinite")
    if any(number < 0 for number in values["scores"].values()):
        raise ValueError("a score is negative")
    if not isinstance(values["metric"], str):
        raise TypeError("the metric is no text")


def _lists(spectra: Spectra) -> dict[str, list[float]]:
    return {name: list(values) for name, values in spectra.items()}


def _tuples(spectra: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {str(name): tuple(float(value) for value in values) for name, values in spectra.items()}
