"""Profilers from the gradient of the frozen weights over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.importance.capture import Measures, SiteRows, measure_sites
from adaptive_lora.methods.importance.contract import (
    Measurement,
    ProfileTask,
    SiteMeasure,
    spectrum,
    squared_singular_values,
)
from adaptive_lora.methods.importance.experts import expert_weight
from adaptive_lora.models.sharding import whole_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanGradients:
    """Gradients of one site, each averaged over supervised tokens."""

    stack: torch.Tensor
    """Gradients on all calibration data, the first half and the second half, shape (3, out, in)."""
    tokens: tuple[int, int]
    """Number of supervised tokens of each half."""


Measure = Callable[[torch.Tensor, MeanGradients], Measures]
"""Function from weight (out, in) and gradients to the measures of all data and of the halves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientProfiler:
    """Profiler by the gradient of the mean loss per supervised token."""

    measure: Measure

    def __call__(self, task: ProfileTask) -> Measurement:
        """Return the measures of every site."""
        modules = dict(task.model.named_modules())
        return measure_sites(
            task,
            lambda site: _Sums(site_weight(modules, site.name), self.measure),
            floats=lambda site: 2 * site.in_features * site.out_features,
        )


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


class HalfSums:
    """Statistic: summed gradients (out, in) and supervised tokens of the two halves at one site."""

    def __init__(self) -> None:
        """Start empty."""
        self.gradients: list[torch.Tensor] = []
        self.tokens = [0, 0]

    def add(self, rows: SiteRows) -> None:
        """Add one pass."""
        for half, chosen in enumerate(rows.halves):
            inputs, gradients = rows.inputs[chosen], rows.gradients[chosen]
            added = gradients.flatten(0, 1).T @ inputs.flatten(0, 1)
            if len(self.gradients) <= half:
                self.gradients.append(added)
            else:
                self.gradients[half] += added
            self.tokens[half] += int(rows.tokens[chosen].sum())

    def means(self) -> MeanGradients:
        """Return the mean gradients; the gradient of a half without supervised tokens is zero."""
        first, second = self.gradients
        tokens = torch.tensor([sum(self.tokens), *self.tokens]).clamp(min=1)
        sums = torch.stack([first + second, first, second])
        return MeanGradients(stack=sums / tokens.to(sums)[:, None, None], tokens=(self.tokens[0], self.tokens[1]))


class _Sums(HalfSums):
    """Statistic of metrics that need the gradient alone."""

    def __init__(self, weight: torch.Tensor, measure: Measure) -> None:
        """Start empty."""
        super().__init__()
        self.weight, self.measure = weight, measure

    def finish(self) -> Measures:
        return self.measure(self.weight, self.means())


def weight_gradient(weight: torch.Tensor, gradients: MeanGradients) -> list[SiteMeasure]:
    """Measure mean |w·g|: GoRA's importance (He et al. 2025, 2502.12171, section 3.2)."""
    return [SiteMeasure(score=float((weight * gradient).abs().mean())) for gradient in gradients.stack]


def gradient_norm(weight: torch.Tensor, gradients: MeanGradients) -> list[SiteMeasure]:
    """Measure the Frobenius norm of the mean gradient; its spectrum is the squared singular values.

    They give the share of the gradient that a rank can follow (LoRA-GA, Wang et al. 2024, 2407.05000).
    They ignore curvature, so they compare poorly between sites of different scale.
    """
    values = squared_singular_values(gradients.stack)
    return [SiteMeasure(score=float(each.sum().sqrt()), spectrum=spectrum(each)) for each in values]


class _Variance(HalfSums):
    """Statistic: squared gradients of single examples, in addition to summed gradients."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.squares, self.examples = [0.0, 0.0], [0, 0]

    def add(self, rows: SiteRows) -> None:
        super().add(rows)
        squares = squared_norms(rows.inputs, rows.gradients)
        for half, chosen in enumerate(rows.halves):
            self.squares[half] += float(squares[chosen].sum())
            self.examples[half] += len(squares[chosen])

    def finish(self) -> Measures:
        first, second = self.gradients
        parts = zip(
            (first + second, first, second),
            (sum(self.squares), *self.squares),
            (sum(self.examples), *self.examples),
            strict=True,
        )
        return [SiteMeasure(score=_variance(*part)) for part in parts]


def _variance(total: torch.Tensor, squares: float, examples: int) -> float:
    """Return the sample variance over examples, averaged over weights."""
    if examples < 2:
        return 0.0
    spread = squares - float(total.double().square().sum()) / examples
    return max(0.0, spread) / (examples - 1) / total.numel()


def squared_norms(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of every example's weight gradient, shape (B,), float64.

    For inputs X (T, in) and output gradients D (T, out) it is the sum of (X Xᵀ)·(D Dᵀ), which
    needs no (out, in) matrix (Goodfellow 2015, 1510.01799). For long examples the matrix is smaller
    and is used instead.
    """
    (_, length, n), m = inputs.shape, gradients.shape[-1]
    if length * (n + m) <= n * m:
        products = (inputs @ inputs.mT) * (gradients @ gradients.mT)
        return products.sum(dim=(1, 2), dtype=torch.float64)
    examples = zip(inputs, gradients, strict=True)
    return torch.stack([(d.T @ x).square().sum(dtype=torch.float64) for x, d in examples])


def gradient_variance(task: ProfileTask) -> Measurement:
    """Measure the variance of single examples' gradients: the centred empirical Fisher diagonal.

    Score: sample variance over examples of the gradient of an example's summed loss, averaged over
    the weights. FIM-LoRA (2605.16800) takes the variance of the gradient of a fresh adapter's B
    over 8 batches; here it is that of the frozen weight over single examples, which needs no
    adapter and does not depend on A's draw. It measures noise as well as signal.

    Raises:
        AllocationError: an example's loss depends on other examples of its batch.
    """
    if any(batch.whole for batch in task.batches):
        raise AllocationError(
            "gradient_variance compares gradients of single examples, and in this task the loss of "
            "an example depends on the others of its batch; use another metric, such as "
            "whitened_gradient."
        )
    return measure_sites(task, lambda site: _Variance(), floats=lambda site: 2 * site.in_features * site.out_features)
