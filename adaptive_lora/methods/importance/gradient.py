"""Profilers from the gradient of the frozen weights over calibration batches, measured together in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.importance.capture import Measures, SiteRows, measurement, site_results
from adaptive_lora.methods.importance.contract import Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.experts import expert_weight
from adaptive_lora.methods.importance.moments import BLOCK, second_moment
from adaptive_lora.methods.importance.spectra import spectrum, squared_singular_values
from adaptive_lora.models.sharding import whole_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanGradients:
    """Gradients of one site, each averaged over supervised tokens."""

    stack: torch.Tensor
    """Gradients on all calibration data, the first half and the second half, shape (3, out, in)."""
    tokens: tuple[int, int]
    """Number of supervised tokens of each half."""


class HalfSums:
    """Statistic: summed gradients (out, in) and supervised tokens of the two halves at one site."""

    def __init__(self) -> None:
        """Start empty."""
        self.sums: list[torch.Tensor | None] = [None, None]
        self.tokens = [0, 0]

    def add(self, rows: SiteRows) -> None:
        """Add one pass."""
        for half, chosen in enumerate(rows.halves):
            inputs, gradients = rows.inputs[chosen], rows.gradients[chosen]
            self.tokens[half] += rows.tokens[half]
            held = self.sums[half]
            if held is not None:
                held.addmm_(gradients.T, inputs)
            elif len(inputs):
                self.sums[half] = gradients.T @ inputs

    @property
    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed gradients of the halves; that of a half without examples is zero."""
        first, second = self.sums
        some = first if first is not None else second
        assert some is not None  # a statistic is made where rows arrive
        zeros = torch.zeros_like(some) if first is None or second is None else some
        return zeros if first is None else first, zeros if second is None else second

    def means(self) -> MeanGradients:
        """Return the mean gradients; the gradient of a half without supervised tokens is zero."""
        first, second = self.gradients
        tokens = torch.tensor([sum(self.tokens), *self.tokens]).clamp(min=1)
        sums = torch.stack([first + second, first, second])
        return MeanGradients(stack=sums.div_(tokens.to(sums)[:, None, None]), tokens=(self.tokens[0], self.tokens[1]))


class SiteSums(HalfSums):
    """Statistic of all gradient metrics at one site; what a metric does not ask for is not summed."""

    def __init__(self, site: AdapterSite, profilers: Mapping[str, GradientProfiler], modules: Mapping[str, nn.Module]):
        """Start empty."""
        super().__init__()
        self.site, self.profilers, self.modules = site, profilers, modules
        self.examples, self.positions, self.squares = [0, 0], 0, [0.0, 0.0]
        self.outputs = self.inputs = torch.zeros(())
        self._squares = any(each.squares for each in profilers.values())
        self._moments = any(each.moments for each in profilers.values())

    def add(self, rows: SiteRows) -> None:
        """Add one pass."""
        super().add(rows)
        if self._squares:
            squares = squared_norms(rows)
            for half, chosen in enumerate((slice(0, rows.split), slice(rows.split, None))):
                self.squares[half] += float(squares[chosen].sum())
                self.examples[half] += len(squares[chosen])
        if self._moments:
            inputs = rows.of_inputs("moment", lambda: second_moment(rows.inputs[rows.mask]))
            outputs = second_moment(rows.gradients)
            first = self.positions == 0
            self.inputs = inputs.clone() if first else self.inputs.add_(inputs)
            self.outputs = outputs if first else self.outputs.add_(outputs)
            self.positions += int(rows.mask.sum())

    def finish(self) -> Mapping[str, Measures]:
        """Return each metric's measures."""
        means = self.means()
        return {name: profiler.measure(self, means) for name, profiler in self.profilers.items()}

    def weight(self) -> torch.Tensor:
        """Return the site's weight (out, in)."""
        return site_weight(self.modules, self.site.name)


Measure = Callable[[SiteSums, MeanGradients], Measures]
"""Function from the sums and mean gradients of a site to the measures of all data and of the halves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientProfiler:
    """Profiler by the gradient of the mean loss per supervised token."""

    measure: Measure
    squares: bool = False
    """Need of the squared norms of single examples' gradients."""
    moments: bool = False
    """Need of the second moments of inputs and output gradients."""

    def __call__(self, task: ProfileTask) -> Measurement:
        """Return the measures of every site."""
        return measure_gradients(task, {"": self})[""]

    def fits(self, task: ProfileTask) -> bool:
        """Return whether the batches can be measured: single examples need batches that can be divided."""
        return not (self.squares and any(batch.whole for batch in task.batches))


def measure_gradients(task: ProfileTask, profilers: Mapping[str, GradientProfiler]) -> dict[str, Measurement]:
    """Measure several metrics in one forward and backward pass over the calibration data.

    Raises:
        AllocationError: a metric compares examples whose loss depends on others of their batch.
    """
    if not all(profiler.fits(task) for profiler in profilers.values()):
        raise AllocationError(
            "gradient_variance compares gradients of single examples, and in this task the loss of "
            "an example depends on the others of its batch; use another metric, such as "
            "whitened_gradient."
        )
    modules = dict(task.model.named_modules())
    found = site_results(task, lambda site: SiteSums(site, profilers, modules), floats=floats_of)
    return {
        metric: measurement(task, {name: each[metric] for name, each in found.results.items()}, found.tokens)
        for metric in profilers
    }


def floats_of(site: AdapterSite) -> int:
    """Return the most floats of a site's sums: gradients of both halves, and blocks of the second moments."""
    return 2 * site.in_features * site.out_features + BLOCK * (site.in_features + site.out_features)


def site_weight(modules: Mapping[str, nn.Module], name: str) -> torch.Tensor:
    """Return the weight (out, in) of a linear layer or of one expert, `NAME[index]`, by its name."""
    return weight_of(modules[name]) if name in modules else expert_weight(modules, name)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a site's weight with shape (out, in); GPT-2's Conv1D stores the transpose.

    The weight of a site in 4 or 8 bit is dequantised, and one that accelerate keeps elsewhere is fetched.
    """
    with align_module_device(module):
        kept = module.weight
        weight = whole_weight(module).float()
        if module.weight is not kept:
            module.weight = kept  # PEFT puts a copy there, which in 8 bit lacks its scales
    return weight.T if isinstance(module, Conv1D) else weight


def weight_gradient(sums: SiteSums, means: MeanGradients) -> list[SiteMeasure]:
    """Measure mean |w·g|: GoRA's importance (He et al. 2025, 2502.12171, section 3.2)."""
    weight = sums.weight()
    return [SiteMeasure(score=float((weight * gradient).abs_().mean())) for gradient in means.stack]


def gradient_norm(sums: SiteSums, means: MeanGradients) -> list[SiteMeasure]:
    """Measure the Frobenius norm of the mean gradient; its spectrum is the squared singular values.

    They give the share of the gradient that a rank can follow (LoRA-GA, Wang et al. 2024, 2407.05000).
    They ignore curvature, so they compare poorly between sites of different scale.
    """
    values = squared_singular_values(means.stack)
    return [SiteMeasure(score=float(each.sum().sqrt()), spectrum=spectrum(each)) for each in values]


def gradient_variance(sums: SiteSums, means: MeanGradients) -> list[SiteMeasure]:
    """Measure the variance of single examples' gradients: the centred empirical Fisher diagonal.

    Score: sample variance over examples of the gradient of an example's summed loss, averaged over
    the weights. FIM-LoRA (2605.16800) takes the variance of the gradient of a fresh adapter's B
    over 8 batches; here it is that of the frozen weight over single examples, which needs no
    adapter and does not depend on A's draw. It measures noise as well as signal.
    """
    first, second = sums.gradients
    parts = zip(
        (first + second, first, second),
        (sum(sums.squares), *sums.squares),
        (sum(sums.examples), *sums.examples),
        strict=True,
    )
    return [SiteMeasure(score=_variance(*part)) for part in parts]


def _variance(total: torch.Tensor, squares: float, examples: int) -> float:
    """Return the sample variance over examples, averaged over weights."""
    if examples < 2:
        return 0.0
    spread = squares - float(total.square().sum(dtype=torch.float64)) / examples
    return max(0.0, spread) / (examples - 1) / total.numel()


def squared_norms(rows: SiteRows) -> torch.Tensor:
    """Return the squared norm of every example's weight gradient, shape (B,), float64.

    For inputs X (T, in) and output gradients D (T, out) it is the sum of (X Xᵀ)·(D Dᵀ), which
    needs no (out, in) matrix (Goodfellow 2015, 1510.01799). For long examples the matrix is smaller
    and is used instead.
    """
    lengths = list(rows.lengths)
    n, m = rows.inputs.shape[-1], rows.gradients.shape[-1]
    found = []
    for index, (x, d) in enumerate(zip(rows.inputs.split(lengths), rows.gradients.split(lengths), strict=True)):
        if len(x) * (n + m) <= n * m:
            products = rows.of_inputs(f"products {index}", lambda x=x: x @ x.T)  # type: ignore[misc]
            found.append((products * (d @ d.T)).sum(dtype=torch.float64))
        else:
            found.append((d.T @ x).square().sum(dtype=torch.float64))
    return torch.stack(found)
