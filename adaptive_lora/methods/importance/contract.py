"""The contract of profilers: their inputs and results, and spectra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch
from adaptive_lora.models.losses import Loss, causal_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedProbe:
    """The base with trained LoRA adapters on it."""

    model: nn.Module
    tokens: int
    """Number of tokens of its training, without padding."""


Trainer = Callable[[], AbstractContextManager[TrainedProbe]]
"""Function that trains LoRA adapters of one rank on every site of the base for a short while; leaving
the context removes them."""


class ProfileRuntime(Protocol):
    """Device and precision of a measurement: a study's `Runtime`, or those of a model as it is."""

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassLimits:
    """Limits of the memory of a measurement."""

    backward_tokens: int | None = None
    """Most padded tokens of a pass with gradients, of one example at least; None: 4,096."""
    forward_tokens: int | None = None
    """Most padded tokens of a pass without gradients, of one example at least; None: 4,096."""
    room: int | None = None
    """Number of floats that the statistics of several sites may take at once, where there are several passes; None:
    three times the weights of the sites, which is enough for the gradients of both halves and the covariances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileTask:
    """Model, sites and data to measure importance on."""

    model: nn.Module
    """Base without adapters, on the runtime's device."""
    sites: Sequence[AdapterSite]
    batches: Sequence[Batch]
    """Calibration batches, from the training split only."""
    runtime: ProfileRuntime
    loss: Loss = causal_loss
    """Loss function of the task, which reads `Batch.labels`."""
    validation: Sequence[Batch] = ()
    """Batches of the validation split; only `ablation` uses them."""
    trained: Trainer | None = None
    """Function that trains adapters, used by `ablation` and `output_energy` only; None: not available."""
    running: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()
    """Context of passes, in which a study's model runs on packed rows as in training."""
    limits: PassLimits = PassLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteMeasure:
    """Value of one metric at one site."""

    score: float
    """Importance, at least 0; a higher value means a higher gain from rank at this site."""
    spectrum: tuple[float, ...] = ()
    """Gain of the first, second ... rank, not increasing; empty for metrics without a spectrum."""


ZERO = SiteMeasure(score=0.0, spectrum=(0.0,))
"""Measure of a site that the loss does not depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Result of a profiler."""

    whole: Mapping[str, SiteMeasure]
    """Site name -> measure on all calibration data."""
    halves: tuple[Mapping[str, SiteMeasure], ...] = ()
    """Site name -> measure on every second example, once from the first and once from the second;
    empty for metrics without data."""
    processed_tokens: int = 0
    """Number of tokens run through the model, without padding and including training."""
    unrouted: tuple[str, ...] = ()
    """Names of routed experts, `NAME[index]`, that no calibration token reached."""


class Profiler(Protocol):
    """A function that measures all sites of a model without changing it."""

    def __call__(self, task: ProfileTask) -> Measurement:
        """Return scores, and spectra if the metric has them, of every site of the task."""
