"""The contract of profilers: what they are given and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.losses import Loss, causal_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedProbe:
    """The base with trained LoRA adapters on it."""

    model: nn.Module
    tokens: int
    """Tokens without padding that the training took."""


Trainer = Callable[[], AbstractContextManager[TrainedProbe]]
"""Trains LoRA adapters of one rank on every site for a short while, inside the base, and takes them
off when the context is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileTask:
    """What is profiled, and on what."""

    model: nn.Module
    """Base without adapters, on the runtime's device."""
    sites: Sequence[AdapterSite]
    batches: Sequence[Batch]
    """Calibration batches, of the training part only."""
    runtime: Runtime
    loss: Loss = causal_loss
    """Another objective (masked tokens, classes) goes here; `Batch.labels` are its to read."""
    validation: Sequence[Batch] = ()
    """Batches of the validation part; only `ablation` looks at them."""
    trained: Trainer | None = None
    """Only `ablation` and `output_energy` train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteMeasure:
    """What one metric says about one site."""

    score: float
    """At least 0; more means that rank is worth more there."""
    spectrum: tuple[float, ...] = ()
    """What the first, second ... rank is worth, not increasing; empty where the metric has none."""


ZERO = SiteMeasure(score=0.0, spectrum=(0.0,))
"""Of a site that the loss does not depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a profiler gives back."""

    whole: Mapping[str, SiteMeasure]
    """Site name -> measure on all calibration data."""
    halves: tuple[Mapping[str, SiteMeasure], ...] = ()
    """The same on every second example, from the first and from the second; empty where data
    plays no part."""
    processed_tokens: int = 0
    """Tokens without padding that were run through the model, training included."""


class Profiler(Protocol):
    """Measures all sites of a model, which it leaves exactly as it was."""

    def __call__(self, task: ProfileTask) -> Measurement:
        """Return scores, and spectra where the metric has some, of every site of the task."""
