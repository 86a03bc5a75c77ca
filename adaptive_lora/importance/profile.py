"""The importance profile: one score per site, with how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation import Evidence
from adaptive_lora.errors import AllocationError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceProfile:
    """Scores of one metric on one training part."""

    metric: str
    scores: Mapping[str, float]
    """Site name -> score; only ratios between sites have a meaning."""
    tokens: int
    """Supervised calibration tokens."""
    seconds: float
    seed: int
    stability: float
    """Spearman correlation between the scores of two halves of the calibration batches; NaN where
    there is one batch. Low values mean that the ranking is noise."""

    def evidence(self) -> Evidence:
        """Return what allocators look at."""
        return Evidence(metric=self.metric, scores=self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; an undefined stability is None."""
        return {
            "metric": self.metric,
            "scores": dict(self.scores),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "seed": self.seed,
            "stability": None if self.stability != self.stability else self.stability,
        }

    def to_json(self) -> str:
        """Return the profile as indented JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> ImportanceProfile:
        """Read a profile written by `to_json`.

        Raises:
            AllocationError: not such a file.
        """
        try:
            values = json.loads(text)
            stability = values["stability"]
            return cls(
                metric=str(values["metric"]),
                scores={str(name): float(score) for name, score in values["scores"].items()},
                tokens=int(values["tokens"]),
                seconds=float(values["seconds"]),
                seed=int(values["seed"]),
                stability=float("nan") if stability is None else float(stability),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AllocationError(
                f"not an importance profile ({type(error).__name__}: {error}); required the JSON "
                "that `adaptive-lora profile` writes."
            ) from error
