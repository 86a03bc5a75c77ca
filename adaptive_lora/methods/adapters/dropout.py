"""Dropout with masks that depend on seed, site and step alone, and the base's own dropout."""

from __future__ import annotations

import torch
from torch import nn

from adaptive_lora.seeding import stream_key


class SiteDropout(nn.Module):
    """Dropout before A, with masks from a stream of its own.

    With torch's global generator, a site's mask would change when a method adapts other sites. The
    mask is drawn from (seed, site, step) in each call, so recomputation under gradient checkpointing
    and resumption from a checkpoint give the same mask.
    """

    def __init__(self, probability: float, *, seed: int, site: str) -> None:
        """Make the module; `set_step` selects the mask."""
        super().__init__()
        self.p = probability
        self._seed, self._site, self._step = seed, site, 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def set_step(self, step: int) -> None:
        """Select the mask of a forward pass, counted from the start of training."""
        self._step = step

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply dropout in training; return the inputs unchanged in evaluation."""
        if not self.training:
            return inputs
        generator = self._generators.setdefault(inputs.device, torch.Generator(inputs.device))
        generator.manual_seed(stream_key(self._seed, "dropout", self._site, self._step))
        keep = torch.empty_like(inputs).bernoulli_(1 - self.p, generator=generator)
        return inputs * keep / (1 - self.p)


def set_dropout_step(model: nn.Module, step: int) -> None:
    """Set the number of the next forward pass in every `SiteDropout` of a model."""
    for module in model.modules():
        if isinstance(module, SiteDropout):
            module.set_step(step)


def own_dropout(module: nn.Module) -> dict[str, float]:
    """Return attribute name -> dropout probability of a module: a layer's `p`, or attributes (Llama, OPT)."""
    if isinstance(module, nn.Dropout):
        return {"p": module.p}
    attributes = vars(module).items()
    return {name: v for name, v in attributes if "dropout" in name and isinstance(v, float)}


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the base itself to 0."""
    for module in model.modules():
        for name in own_dropout(module):
            setattr(module, name, 0.0)
