"""The importance profile, its measurement, and the profilers by name."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from adaptive_lora.allocation.request import PROFILER_GROUP, ProfileSummary
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.importance.activation import activation_spectrum
from adaptive_lora.methods.importance.contract import Measurement, Profiler, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.gradient import (
    GradientProfiler,
    gradient_norm,
    gradient_variance,
    measure_gradients,
    weight_gradient,
)
from adaptive_lora.methods.importance.trained import ablation, output_energy
from adaptive_lora.methods.importance.visible import Visible, visible
from adaptive_lora.methods.importance.weights import WeightProfiler, condition_number, heavy_tail, stable_rank
from adaptive_lora.methods.importance.whitened import whitened_gradient
from adaptive_lora.plugins import PluginTable, checked

_OWN: Mapping[str, Profiler] = MappingProxyType(
    {
        "weight_gradient": GradientProfiler(measure=weight_gradient),
        "gradient_norm": GradientProfiler(measure=gradient_norm),
        "gradient_variance": GradientProfiler(measure=gradient_variance, squares=True),
        "whitened_gradient": GradientProfiler(measure=whitened_gradient, moments=True),
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


_SHOWN = 4
"""Number of experts that a message names."""
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
    unrouted: tuple[str, ...] = ()
    """Names of routed experts, `NAME[index]`, that no calibration token reached; they add nothing to their scores."""
    sites: tuple[AdapterSite, ...] = ()
    """The sites that were measured, in module order; empty in profiles that earlier versions wrote."""
    together: tuple[str, ...] = ()
    """Names of the metrics measured in the same passes, of which `seconds` is the time."""
    visible: Visible | None = None
    """Components above the noise edge; None for metrics without one, and in profiles of earlier versions."""

    def summary(self) -> ProfileSummary:
        """Return the values that methods use to allocate ranks."""
        return ProfileSummary(metric=self.metric, scores=self.scores, spectra=self.spectra, replicates=self.replicates)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; an undefined stability is None."""
        values = asdict(self) | {"stability": None if math.isnan(self.stability) else self.stability}
        return values | {"visible": None if self.visible is None else self.visible.to_dict()}

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
                unrouted=tuple(str(name) for name in values.get("unrouted", ())),
                sites=tuple(AdapterSite.from_dict(row) for row in values.get("sites", ())),
                together=tuple(str(name) for name in values.get("together", ())),
                visible=None if (found := values.get("visible")) is None else Visible.from_dict(found),
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


def _tuples(spectra: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {str(name): tuple(float(value) for value in values) for name, values in spectra.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurement of one metric, before it is judged."""

    measurement: Measurement
    seconds: float
    """Wall time in seconds of the passes that it was measured in, with the metrics that share them."""
    together: tuple[str, ...]
    """Names of the metrics measured in the same passes, its own among them."""


def measured(task: ProfileTask, metrics: Sequence[str]) -> dict[str, Measured]:
    """Measure several metrics; the model is not changed. Gradient metrics share one pass over the data.

    Args:
        task: model, sites and calibration data.
        metrics: keys of `PROFILERS`.
    """
    found: dict[str, Measured] = {}
    shared = {name: each for name in metrics if isinstance(each := PROFILERS[name], GradientProfiler)}
    if shared:
        started = time.perf_counter()
        for name, result in measure_gradients(task, shared).items():
            found[name] = Measured(measurement=result, seconds=0.0, together=tuple(shared))
        seconds = time.perf_counter() - started
        found = {name: replace(one, seconds=seconds) for name, one in found.items()}
    for name in metrics:
        if name not in found:
            started = time.perf_counter()
            alone = PROFILERS[name](task)
            found[name] = Measured(measurement=alone, seconds=time.perf_counter() - started, together=(name,))
    return found


def shares_a_pass(metric: str, task: ProfileTask) -> bool:
    """Return whether a metric can be measured in one pass with others on these batches."""
    profiler = PROFILERS[metric]
    return isinstance(profiler, GradientProfiler) and profiler.fits(task)


def profile_importance(task: ProfileTask, *, metric: str, seed: int) -> ImportanceProfile:
    """Measure the importance of sites by one metric, with the arguments and errors of `profile_importances`."""
    return profile_importances(task, metrics=(metric,), seed=seed)[metric]


def profile_importances(task: ProfileTask, *, metrics: Sequence[str], seed: int) -> dict[str, ImportanceProfile]:
    """Measure the importance of sites by several metrics; the model is not changed.

    Args:
        task: model, sites and calibration data.
        metrics: keys of `PROFILERS`.
        seed: seed that drew the batches, recorded in the profiles.

    Raises:
        AllocationError: a measurement has no information on where ranks should go.
    """
    return {metric: profile_of(task, metric, each, seed=seed) for metric, each in measured(task, metrics).items()}


def profile_of(task: ProfileTask, metric: str, found: Measured, *, seed: int) -> ImportanceProfile:
    """Return the profile of a measurement.

    Raises:
        AllocationError: it has no information on where ranks should go.
    """
    measurement = found.measurement
    _require_sites(task, metric, measurement)
    _require_meaning(metric, measurement)
    stability, note = _stability(measurement)
    if measurement.unrouted:
        logging.getLogger(__name__).warning("%s", unrouted_text(task.sites, measurement.unrouted))
    has_spectra = all(measure.spectrum for measure in measurement.whole.values())
    return ImportanceProfile(
        metric=metric,
        scores={name: measure.score for name, measure in measurement.whole.items()},
        spectra=_spectra(measurement.whole) if has_spectra else None,
        replicates=tuple(_spectra(half) for half in measurement.halves),
        tokens=sum(batch.supervised_tokens for batch in task.batches) if measurement.halves else 0,
        processed_tokens=measurement.processed_tokens,
        seconds=found.seconds,
        seed=seed,
        stability=stability,
        stability_note=note,
        unrouted=measurement.unrouted,
        sites=tuple(task.sites),
        together=found.together,
        visible=visible(metric, measurement, sum(batch.examples for batch in task.batches)),
    )


def unrouted_text(sites: Sequence[AdapterSite], unrouted: Sequence[str]) -> str:
    """Return a sentence on experts that no calibration token reached: their number and the first names."""
    every = sum(site.experts for site in sites)
    more = ", ..." if len(unrouted) > _SHOWN else ""
    return (
        f"{len(unrouted)} of {every} weights of experts were reached by no calibration token and score 0: "
        f"{', '.join(unrouted[:_SHOWN])}{more}. More calibration batches (--profile-batches) may reach them."
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
    """Return Spearman's correlation between the halves' scores, or NaN and the reason why it is undefined."""
    if not measured.halves:
        return math.nan, "the metric looks at weights alone; calibration data plays no part"
    first, second = ([measure.score for measure in half.values()] for half in measured.halves)
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan, "one half of the calibration data scores all sites the same"
    return float(spearmanr(first, second).statistic), ""
