"""The input of a method, a measured profile, and its request for ranks, before integers and budgets."""

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
"""Entry points with which other packages add profilers."""


def _text(entry: EntryPoint) -> str:
    return f"from {package_of(entry)}"


METRICS: PluginTable[str] = PluginTable(_OWN, PROFILER_GROUP, _text)
"""Importance metric -> what it measures. `importance.PROFILERS` has a profiler for each."""

SPECTRAL_METRICS = ("whitened_gradient", "gradient_norm", "activation_spectrum")
"""Metrics that also say what each rank of a site is worth, each in its own unit."""
MAYBE_SPECTRAL: PluginTable[str] = PluginTable({name: _OWN[name] for name in SPECTRAL_METRICS}, PROFILER_GROUP, _text)
"""They and those of other packages, which may do so too."""

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
    """Site name -> what its first, second ... rank is worth, not increasing; None where the
    profiler knows no spectrum."""
    replicates: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    """Spectra measured again on parts or resamples of the calibration data: how sure they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRequest:
    """Ranks that a method asks for, before integers and budgets."""

    ranks: tuple[float, ...]
    """Wanted rank per site; rounded down without a budget, taken as proportions with one."""
    bounds: tuple[float, float] | None = None
    """Least and greatest rank under a budget, as multiples of the rank that uniform would have;
    None: 1 to the site's smaller side."""
    budget: int | None = None
    """Parameters that the method spends when the user names no budget."""
