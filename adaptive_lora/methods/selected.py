"""Tuners that train the base's own weights: all of them, or a selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture, Shape
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TrainedTrial, TrialContext, TunerMethod
from adaptive_lora.methods.size_parameter import unused_note, within


@dataclass(frozen=True, kw_only=True)
class _Selected(TunerMethod):
    """A tuner of the base's weights, without options or size parameter."""

    def label_under(self, budget: str | None) -> str:
        """Return an empty label, because there are no options."""
        return ""

    def fit(self, trial: TrialContext) -> TrainedTrial:
        """Train the planned tensors."""
        from adaptive_lora.methods.adapters.custom_tuner import fit_custom_tuner

        return fit_custom_tuner(trial)


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(_Selected):
    """All weights of the base: the reference for quality and for the reduction of parameters.

    Tied weights stay tied and count once. The trained copy is float32 at any precision.
    """

    name: ClassVar[str] = "full"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return all tensors."""
        return _plan(base.tensors, base.tensors, "full", budget, method)


@dataclass(frozen=True, kw_only=True)
class BitFit(_Selected):
    """Bias terms only (Ben Zaken et al. 2022, 2106.10199), including those of normalisation layers."""

    name: ClassVar[str] = "bitfit"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the biases; bases without biases (Llama) are an error."""
        if not base.biases:
            raise AllocationError(
                f"{method}: {base.kind} has no bias terms; required some to train. Use ln_tuning, "
                "or a base with biases such as GPT-2, OPT or BERT."
            )
        return _plan(base.tensors, base.biases, "bitfit", budget, method)


@dataclass(frozen=True, kw_only=True)
class LnTuning(_Selected):
    """Normalisation layers only (Zhao et al. 2023, 2312.11420): their scales and shifts."""

    name: ClassVar[str] = "ln_tuning"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the tensors of all normalisation layers."""
        norms = [name for name in base.tensors if name in base.norm_tensors]
        if not norms:
            raise AllocationError(f"{method}: {base.kind} has no normalisation layer with weights.")
        return _plan(base.tensors, norms, "ln_tuning", budget, method)


@dataclass(frozen=True, kw_only=True)
class HeadOnly(_Selected):
    """The output head only: the language-model head, or a task's classifier.

    Where the head's weight is tied to the input embedding (GPT-2, small Llamas), the embeddings are
    trained with it.
    """

    name: ClassVar[str] = "head_only"

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the head's tensors."""
        if not base.head:
            raise AllocationError(f"{method}: {base.kind} has no output head.")
        tied = ("The head is tied to the input embeddings: training it changes both.",)
        notes = tied if base.head_tied else ()
        return _plan(base.tensors, base.head, "head_only", budget, method, notes)


def _plan(
    shapes: Mapping[str, Shape],
    names: Iterable[str],
    family: str,
    budget: int | None,
    method: str,
    notes: tuple[str, ...] = (),
) -> TunerPlan:
    plan = TunerPlan(
        method=method, family=family, settings={}, tensors={name: shapes[name] for name in names}, budget=budget
    )
    within(plan.trainable_parameters, budget, method)
    unused = unused_note(plan.trainable_parameters, budget, method)
    return dataclasses.replace(plan, notes=(*notes, *unused))
