"""Methods that choose both ranks and initial weights; either can be switched off, to separate the two effects."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptive_lora.allocation.plan import RankPlan
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.base import RankMethod, TrainedTrial, TrialContext
from adaptive_lora.options import Limits, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Initialised(RankMethod):
    """A method with its own ranks and initial weights.

    A study can compare `eva`, `eva:init=default` (its ranks alone) and `eva:ranks=uniform` (its initial weights
    alone); likewise for `gora`.
    """

    refused_variants: ClassVar[Mapping[str, str]] = {
        "experts": "it initialises A or B of linear layers, not those of stacked experts"
    }
    side: ClassVar[str]
    """Matrix that it initialises: `lora_A` or `lora_B`."""
    ranks: str = option(
        "own",
        "'own': by explained variance (eva) or mean |w·g| (gora); 'uniform': equal",
        limits=Limits(choices=("own", "uniform")),
        label="{}_ranks",
    )
    init: str = option(
        "own",
        "'own': A from the inputs (eva) or B from the gradient (gora); 'default': A random and B zero, as in other "
        "methods",
        limits=Limits(choices=("own", "default")),
        label="{}_init",
    )

    def __post_init__(self) -> None:
        """Refuse options that make another method."""
        if (self.ranks, self.init) == ("uniform", "default"):
            raise ConfigError(f"{self.name}:ranks=uniform,init=default is plain uniform; name that instead.")

    def start_from(self, trial: TrialContext) -> tuple[RankPlan, Mapping[str, torch.Tensor]]:
        """Return the plan, and site name -> initial weight of `side`; its first rows are used, or the default's."""
        raise NotImplementedError

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Find the plan and the initial weights, unless they are those of plain LoRA, and train."""
        if self.is_plain_lora:
            return super().fit(trial)
        import torch

        from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers, start_magnitudes
        from adaptive_lora.methods.adapters.audit import audit_moved

        started = time.perf_counter()
        plan, initial = self.start_from(trial)
        adapted = trial.attach(plan)
        with torch.no_grad():
            for name, layer in lora_layers(adapted).items():
                if name in initial:
                    weight = getattr(layer, self.side)[ADAPTER].weight
                    weight.copy_(initial[name][: len(weight)])
        start_magnitudes(adapted)
        seconds = time.perf_counter() - started
        result = trial.train(adapted)
        audit_moved(adapted, initial if self.side == "lora_B" else None)
        return TrainedTrial(
            model=adapted,
            plan=plan,
            result=result,
            training_parameters=plan.trainable_parameters,
            search_seconds=seconds,
        )
