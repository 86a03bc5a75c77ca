"""Profilers of trained adapters, after a short uniform training.

Their cost includes that training; other profilers cost less than a tenth of a training run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adaptive_lora.data import Batch
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.importance.capture import Measures, SiteRows, frozen, measure_sites
from adaptive_lora.methods.importance.contract import Measurement, ProfileTask, SiteMeasure, Trainer
from adaptive_lora.methods.importance.passes import halved


def ablation(task: ProfileTask) -> Measurement:
    """Measure the rise of the validation loss when a site's trained adapter is removed.

    In nats per supervised token, with all other adapters in place (the leave-one-out term of ALoRA,
    2403.16187). A site whose removal lowers the loss scores 0. The cost is one pass over the
    validation batches per site, in addition to the training.
    """
    passes = halved(task.validation)
    halves = [[batch for part in passes if (batch := part.half(second)) is not None] for second in (0, 1)]
    with _trainer("ablation", task)() as probe, frozen(probe.model), torch.no_grad():
        layers = lora_layers(task.model)
        tokens = [sum(batch.supervised_tokens for batch in half) for half in halves]
        before = [_loss(task, half) for half in halves]
        rises = {}
        for site in task.sites:
            with _without(layers[site.name]):
                rises[site.name] = [_loss(task, half) - loss for half, loss in zip(halves, before, strict=True)]
    parts = [
        {name: SiteMeasure(score=max(0.0, rise[half]) / max(1, tokens[half])) for name, rise in rises.items()}
        for half in (0, 1)
    ]
    return Measurement(
        whole={name: SiteMeasure(score=max(0.0, sum(rise)) / sum(tokens)) for name, rise in rises.items()},
        halves=tuple(parts),
        processed_tokens=probe.tokens + (len(task.sites) + 1) * sum(batch.tokens for half in halves for batch in half),
    )


def _trainer(metric: str, task: ProfileTask) -> Trainer:
    if stacked := [site.name for site in task.sites if site.experts]:
        raise AllocationError(
            f"{metric} looks at trained adapters of linear layers, not of routed experts such as {stacked[0]}; "
            "leave out experts, or use a metric of the frozen base, such as whitened_gradient."
        )
    if task.trained is None or (metric == "ablation" and not task.validation):
        raise AllocationError(
            f"{metric} looks at trained adapters; required a training and validation data, which "
            "this task does not have. Use a metric of the frozen base, such as whitened_gradient."
        )
    return task.trained


def _loss(task: ProfileTask, batches: Sequence[Batch]) -> float:
    total = 0.0
    for batch in batches:
        with task.runtime.autocast():
            total += float(task.loss(task.model, batch.to(task.runtime.device)))
    return total


@contextmanager
def _without(layer: Any) -> Iterator[None]:
    """Switch one layer's adapter off inside the block, by a scale of zero."""
    before = dict(layer.scaling)
    layer.scaling.update(dict.fromkeys(before, 0.0))
    try:
        yield
    finally:
        layer.scaling.update(before)


def output_energy(task: ProfileTask) -> Measurement:
    """Measure the energy that a site's trained adapter adds to its output.

    Mean over calibration tokens of ||s B A x||² (LoRA-drop, Zhou et al. 2024, 2402.07721),
    with the adapter's scale s, equal at all sites. The metric favours sites with large inputs.
    """
    with _trainer("output_energy", task)() as probe:
        layers = lora_layers(task.model)
        found = measure_sites(task, lambda site: _Energy(layers[site.name]), floats=lambda site: 4, backward=False)
    return Measurement(whole=found.whole, halves=found.halves, processed_tokens=found.processed_tokens + probe.tokens)


class _Energy:
    """Statistic: squared norm of an adapter's output, and number of positions."""

    def __init__(self, layer: Any) -> None:
        """Start empty."""
        (adapter,) = layer.active_adapters
        self.down = layer.lora_A[adapter].weight.detach().float()
        self.up = layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter]
        self.energy, self.positions = [0.0, 0.0], [0, 0]

    def add(self, rows: SiteRows) -> None:
        for half, chosen in enumerate(rows.halves):
            inputs = rows.inputs[chosen][rows.mask[chosen]]
            added = inputs @ self.down.T @ self.up.T
            self.energy[half] += float(added.square().sum(dtype=torch.float64))
            self.positions[half] += len(inputs)

    def finish(self) -> Measures:
        sums = (sum(self.energy), *self.energy), (sum(self.positions), *self.positions)
        return [SiteMeasure(score=energy / max(1, positions)) for energy, positions in zip(*sums, strict=True)]
