"""The profilers by name, and the measurement of a profile."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType

from adaptive_lora.allocation.request import PROFILER_GROUP
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.importance.activation import activation_spectrum
from adaptive_lora.methods.importance.contract import Measurement, Profiler, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.gradient import (
    GradientProfiler,
    gradient_norm,
    gradient_variance,
    weight_gradient,
)
from adaptive_lora.methods.importance.profile import ImportanceProfile
from adaptive_lora.methods.importance.spectra import rank_correlation
from adaptive_lora.methods.importance.trained import ablation, output_energy
from adaptive_lora.methods.importance.weights import WeightProfiler, condition_number, heavy_tail, stable_rank
from adaptive_lora.methods.importance.whitened import whitened_gradient
from adaptive_lora.plugins import PluginTable, checked

_OWN: Mapping[str, Profiler] = MappingProxyType(
    {
        "weight_gradient": GradientProfiler(measure=weight_gradient),
        "gradient_norm": GradientProfiler(measure=gradient_norm),
        "gradient_variance": gradient_variance,
        "whitened_gradient": whitened_gradient,
        "activation_spectrum": activation_spectrum,
        "heavy_tail": WeightProfiler(score=heavy_tail),
        "stable_rank": WeightProfiler(score=stable_rank),
        "condition_number": WeightProfiler(score=condition_number),
        "ablation": ablation,
        "output_energy": output_energy,
    }
)


def _problem(profiler: object) -> str | None:
    """Return why an object is not a profiler, or None."""
    if isinstance(profiler, type) or not callable(profiler):
        return f"required a function of a ProfileTask, got {profiler!r}"
    return None


PROFILERS: PluginTable[Profiler] = PluginTable(_OWN, PROFILER_GROUP, checked(_problem))
"""Metric -> profiler; `allocation.METRICS` has the same names with their meaning."""


def profile_importance(task: ProfileTask, *, metric: str, seed: int) -> ImportanceProfile:
    """Measure the importance of sites; the model is not changed.

    Args:
        task: model, sites and calibration data.
        metric: key of `PROFILERS`.
        seed: seed that drew the batches, recorded in the profile.

    Raises:
        AllocationError: the measurement has no information on where ranks should go.
    """
    started = time.perf_counter()
    measured = PROFILERS[metric](task)
    seconds = time.perf_counter() - started
    _require_sites(task, metric, measured)
    _require_meaning(metric, measured)
    stability, note = _stability(measured)
    has_spectra = all(measure.spectrum for measure in measured.whole.values())
    return ImportanceProfile(
        metric=metric,
        scores={name: measure.score for name, measure in measured.whole.items()},
        spectra=_spectra(measured.whole) if has_spectra else None,
        replicates=tuple(_spectra(half) for half in measured.halves),
        tokens=sum(batch.supervised_tokens for batch in task.batches) if measured.halves else 0,
        processed_tokens=measured.processed_tokens,
        seconds=seconds,
        seed=seed,
        stability=stability,
        stability_note=note,
    )


def _spectra(measures: Mapping[str, SiteMeasure]) -> dict[str, tuple[float, ...]]:
    return {name: measure.spectrum or (measure.score,) for name, measure in measures.items()}


def _require_sites(task: ProfileTask, metric: str, measured: Measurement) -> None:
    """Refuse a profile of other sites than those of the task."""
    wanted = {site.name for site in task.sites}
    for measures in (measured.whole, *measured.halves):
        if odd := sorted(wanted ^ set(measures)):
            raise AllocationError(
                f"the {metric} profiler measured other sites than the {len(wanted)} it was given: "
                f"{len(odd)} are missing or too many, such as {odd[0]}."
            )


def _require_meaning(metric: str, measured: Measurement) -> None:
    """Refuse a profile that would silently give uniform or meaningless ranks."""
    scores = [measure.score for measure in measured.whole.values()]
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise AllocationError(
            f"the {metric} profile is degenerate: a score is negative or not finite. Use precision "
            "bf16 or fp32, or another metric."
        )
    if not any(scores):
        raise AllocationError(
            f"the {metric} profile is degenerate: every site scores 0, so nothing can be told from "
            "noise. Use more calibration batches (--profile-batches) or another metric."
        )


def _stability(measured: Measurement) -> tuple[float, str]:
    if not measured.halves:
        return math.nan, "the metric looks at weights alone; calibration data plays no part"
    first, second = ([measure.score for measure in half.values()] for half in measured.halves)
    correlation = rank_correlation(first, second)
    if math.isnan(correlation):
        return correlation, "one half of the calibration data scores all sites the same"
    return correlation, ""
