"""EVA's directions through PEFT: the singular vectors of each site's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora.eva import HashHook, SVDHook
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.adapters.attach import peft_task
from adaptive_lora.errors import AllocationError

_PASSES_PER_BATCH = 100
"""PEFT cycles through the batches until every direction has been found; this ends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaSettings:
    """What PEFT is asked for."""

    rank: int
    """Mean rank, of the budget in ranks."""
    rho: float
    """Greatest rank of a site over `rank`; 1: `rank` directions everywhere."""
    tau: float

    @property
    def components(self) -> int:
        """Directions that are looked for at each site."""
        return round(self.rank * self.rho)


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """What PEFT found."""

    a: Mapping[str, torch.Tensor]
    """Site name -> (rank, in) singular vectors, best first; as many as EVA's ranks."""
    explained: Mapping[str, tuple[float, ...]]
    """Site name -> share of the inputs' variance that each direction explains."""


def eva_directions(
    model: nn.Module,
    sites: Sequence[str],
    batches: Sequence[Mapping[str, torch.Tensor]],
    settings: EvaSettings,
    run: Callable[[nn.Module, Mapping[str, torch.Tensor]], Any],
) -> Directions:
    """Return EVA's initial A of every site; the model is left as it was.

    Args:
        model: the base, without adapters, in evaluation mode.
        sites: module names.
        batches: model inputs with labels; only supervised positions count.
        settings: ranks.
        run: runs the model on a batch.

    Raises:
        AllocationError: too few supervised positions or inputs for so many directions, or they
            were not found.
    """
    _check_sizes(model, sites, batches, settings)
    hooks, first = dict[str, SVDHook](), dict[str, HashHook]()
    passes = 0

    def watched(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
        nonlocal passes
        passes += 1
        if passes > _PASSES_PER_BATCH * len(batches):
            raise AllocationError(
                f"EVA's directions still turn after {passes - 1} passes; lower tau "
                f"(now {settings.tau:g}) or raise profile_batches."
            )
        for name in sites:
            for hook in module.get_submodule(name)._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    hooks[name] = hook
                elif isinstance(hook, HashHook):
                    first[name] = hook
        return run(module, inputs)

    with _hooks_removed(model, sites):
        found = get_eva_state_dict(
            model, batches, _config(model, sites, settings), watched, show_progress_bar=False
        )
    shown = {name: hook.hashed_inputs[0] for name, hook in first.items()}
    owner = {shown[name]: hook for name, hook in hooks.items()}
    return Directions(
        a={name: found[name].float() for name in sites},
        explained={
            name: tuple(owner[shown[name]].svd.explained_variance_ratio_.tolist()) for name in sites
        },
    )


def _config(model: nn.Module, sites: Sequence[str], settings: EvaSettings) -> LoraConfig:
    modules = dict(model.named_modules())
    return LoraConfig(
        task_type=peft_task(model),
        r=settings.rank,
        target_modules=list(sites),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=settings.rho, tau=settings.tau),
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in sites),
    )


def _check_sizes(
    model: nn.Module,
    sites: Sequence[str],
    batches: Sequence[Mapping[str, torch.Tensor]],
    settings: EvaSettings,
) -> None:
    """PEFT's incremental SVD keeps twice as many vectors as it is asked for."""
    needed = 2 * settings.components
    modules = dict(model.named_modules())
    narrow = min(
        int(m.weight.shape[0]) if isinstance(m := modules[n], Conv1D) else m.in_features
        for n in sites
    )
    fewest = min((int((batch["labels"] != -100).sum()) for batch in batches), default=0)
    if needed > narrow:
        raise AllocationError(
            f"EVA looks for {settings.components} directions and needs twice as many inputs a "
            f"site; the narrowest has {narrow}. Lower rank or rho."
        )
    if needed > fewest:
        raise AllocationError(
            f"EVA looks for {settings.components} directions and needs {needed} supervised tokens "
            f"in the calibration data; found {fewest}. Raise profile_batches or "
            "profile_batch_size, or lower rank or rho."
        )


@contextmanager
def _hooks_removed(model: nn.Module, sites: Sequence[str]) -> Iterator[None]:
    """Leave no hook of PEFT behind, even where it is interrupted."""
    try:
        yield
    finally:
        for name in sites:
            hooks = model.get_submodule(name)._forward_hooks
            for key, hook in list(hooks.items()):
                if isinstance(hook, SVDHook | HashHook):
                    del hooks[key]
