"""Tuners that train the base's own weights: all of them, or a selection."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TunerMethod


@dataclass(frozen=True, kw_only=True)
class _Selected(TunerMethod):
    """A tuner of the base's weights, without options or size parameter."""

    part: ClassVar[str]
    """Attribute of `Architecture` with the names of the tensors to train."""
    missing: ClassVar[str]
    """End of the message on a base without such weights."""

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the selected tensors; a base without any is an error."""
        names = getattr(base, self.part)
        if not names:
            raise AllocationError(f"{method}: {base.kind} has no {self.missing}")
        tensors = {name: shape for name, shape in base.tensors.items() if name in names}
        return TunerPlan(method=method, family=self.name, settings={}, tensors=tensors, budget=budget)


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(_Selected):
    """All weights of the base: the reference for quality and for the reduction of parameters.

    Tied weights stay tied and count once. The trained copy is float32 at any precision.
    """

    name: ClassVar[str] = "full"
    part: ClassVar[str] = "tensors"
    missing: ClassVar[str] = "weights."


@dataclass(frozen=True, kw_only=True)
class BitFit(_Selected):
    """Bias terms only (Ben Zaken et al. 2022, 2106.10199), including those of normalisation layers.

    There are none in Llama and others.
    """

    name: ClassVar[str] = "bitfit"
    part: ClassVar[str] = "biases"
    missing: ClassVar[str] = (
        "bias terms; required some to train. Use ln_tuning, or a base with biases such as GPT-2, OPT or BERT."
    )


@dataclass(frozen=True, kw_only=True)
class LnTuning(_Selected):
    """Normalisation layers only (Zhao et al. 2023, 2312.11420): their scales and shifts."""

    name: ClassVar[str] = "ln_tuning"
    part: ClassVar[str] = "norm_tensors"
    missing: ClassVar[str] = "normalisation layer with weights."


@dataclass(frozen=True, kw_only=True)
class HeadOnly(_Selected):
    """The output head only: the language-model head, or a task's classifier.

    Where the head's weight is tied to the input embedding (GPT-2, small Llamas), the embeddings are
    trained with it.
    """

    name: ClassVar[str] = "head_only"
    part: ClassVar[str] = "head"
    missing: ClassVar[str] = "output head."

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return the head's tensors, with a note where they are the embeddings' as well."""
        plan = super().design(base, budget, method)
        tied = "The head is tied to the input embeddings: training it changes both."
        return dataclasses.replace(plan, notes=(tied,)) if base.head_tied else plan
