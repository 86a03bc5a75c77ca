"""Profilers of the weights alone, without data or replicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance.contract import Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.experts import summed, units_of
from adaptive_lora.methods.importance.gradient import site_weight
from adaptive_lora.methods.importance.spectra import squared_singular_values


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightProfiler:
    """Profiler by the eigenvalues of W Wᵀ.

    It gives no spectrum in the sense of the contract: the size of a weight's component does not give
    the gain of a rank of its update.
    """

    score: Callable[[torch.Tensor], float]
    """Function from the squared singular values of a weight, not increasing, to its score."""

    def __call__(self, task: ProfileTask) -> Measurement:
        """Return the scores of every site."""
        modules = dict(task.model.named_modules())
        found = {}
        for site in task.sites:
            found[site.name] = summed([self._measured(modules, unit.name) for unit in units_of(site)])
        return Measurement(whole=found)

    def _measured(self, modules: Mapping[str, nn.Module], name: str) -> SiteMeasure:
        weight = site_weight(modules, name).double()
        if not torch.isfinite(weight).all():
            raise ModelError(f"the weight of {name} is not finite; required a model as it was trained.")
        values = squared_singular_values(weight)
        return SiteMeasure(score=self.score(values) if float(values[0]) > 0 else 0.0)


def heavy_tail(eigenvalues: torch.Tensor) -> float:
    """Return PL_Alpha_Hill, the exponent of the spectrum's tail (AlphaLoRA, 2410.10054).

    1 + k / sum over i <= k of ln(lambda_(N-i+1) / lambda_(N-k)), with lambda ascending and k = N/2.
    AlphaLoRA gives more experts where it is larger, because a light tail marks a less trained layer;
    here such a site gets more rank.
    """
    k = max(1, len(eigenvalues) // 2)
    reference = eigenvalues[min(k, len(eigenvalues) - 1)]
    logs = (eigenvalues[:k] / reference).log().sum()
    return 1 + k / max(float(logs), torch.finfo(torch.float64).tiny)


def stable_rank(eigenvalues: torch.Tensor) -> float:
    """Return the stable rank ||W||_F² / ||W||_2², the effective number of directions of a weight."""
    return float(eigenvalues.sum() / eigenvalues[0])


def condition_number(eigenvalues: torch.Tensor) -> float:
    """Return sigma_min / sigma_max: one over the condition number.

    KappaTune (2506.16289) adapts only the layers with the smallest condition numbers, which it takes
    to be the least specialised; the inverse gives these the highest scores.
    """
    return float((eigenvalues[-1] / eigenvalues[0]).sqrt())
