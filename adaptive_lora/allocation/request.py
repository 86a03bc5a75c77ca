"""A method's input, the measured profile, and its request for ranks before rounding and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType

from adaptive_lora.options import Limits
from adaptive_lora.plugins import PluginTable, package_of

_OWN: Mapping[str, str] = MappingProxyType(
    {
        "weight_gradient": "mean |w·g|",
        "gradient_norm": "norm of the mean gradient",
        "gradient_variance": "variance of single examples' gradients",
        "whitened_gradient": "gain in nats of each rank, above the noise",
        "activation_spectrum": "effective rank of the inputs",
        "heavy_tail": "exponent of the weight's spectrum",
        "stable_rank": "stable rank of the weight",
        "condition_number": "one over the weight's condition number",
        "ablation": "loss without a site's trained adapter",
        "output_energy": "energy of a trained adapter's output",
    }
)
PROFILER_GROUP = "adaptive_lora.profilers"
"""Entry-point group in which other packages add profilers."""


def _text(entry: EntryPoint) -> str:
    return f"from {package_of(entry)}"


METRICS: PluginTable[str] = PluginTable(_OWN, PROFILER_GROUP, _text)
"""Importance metric -> the measured quantity. `importance.PROFILERS` has a profiler for each."""

SPECTRAL_METRICS = ("whitened_gradient", "gradient_norm", "activation_spectrum")
"""Metrics that also give the gain of each rank of a site, each in its own unit."""
MAYBE_SPECTRAL: PluginTable[str] = PluginTable({name: _OWN[name] for name in SPECTRAL_METRICS}, PROFILER_GROUP, _text)
"""Metrics that give, or may give, a spectrum: those of `SPECTRAL_METRICS` and of other packages."""

RANK = Limits(low=1)
"""Limits of every option that is a rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSummary:
    """Measured importance of the sites: the input of data-driven methods."""

    metric: str
    """Name of the profiler."""
    scores: Mapping[str, float]
    """Site name -> importance; only ratios between sites have a meaning."""
    spectra: Mapping[str, tuple[float, ...]] | None = None
    """Site name -> gain of its first, second ... rank, not increasing; None where the profiler
    gives no spectrum."""
    replicates: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    """Spectra measured again on subsets or resamples of the calibration data, to show their uncertainty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRequest:
    """Ranks that a method requests, before rounding and budget."""

    ranks: tuple[float, ...]
    """Wanted rank per site, of experts as of a linear layer; rounded down without a budget, proportions with one."""
    bounds: tuple[float, float] | None = None
    """Minimum and maximum rank under a budget, as multiples of the rank that uniform would have;
    None: 1 to the site's smaller side."""
    budget: int | None = None
    """Number of parameters that the method spends when the user gives no budget."""
