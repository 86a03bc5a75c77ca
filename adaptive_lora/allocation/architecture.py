"""Sites, tensors and sizes of a base model as numbers: the input of every plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSurvey:
    """The linear layers in the blocks of a model, with and without support for adapters."""

    sites: tuple[AdapterSite, ...]
    """Linear layers that can take an adapter, in module order."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Full module name of a linear layer that cannot take an adapter -> the reason."""
    untried: frozenset[str] = frozenset()
    """Names of sites whose influence on the output cannot be checked without weights."""
    experts: tuple[AdapterSite, ...] = ()
    """Stacks of routed experts' weights that PEFT adapts, in module order; sites of a method with `experts`."""
    experts_note: str = ""
    """Sentences on what is frozen in a mixture of experts; empty for other models."""

    def sites_of(self, experts: bool) -> tuple[AdapterSite, ...]:
        """Return the sites, with routed experts where wanted.

        Raises:
            ModelError: routed experts are wanted, and there are none that take adapters.
        """
        if experts and not self.experts:
            raise ModelError(
                "this base has no routed experts that take adapters: required a mixture of experts whose weights are "
                f"stacked as PEFT reads them. {self.experts_note or 'It is a dense model.'} Leave out experts."
            )
        return (*self.sites, *self.experts) if experts else self.sites


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Sizes of a causal language model that determine the number of parameters of virtual tokens."""

    width: int
    """Width of the input embeddings; some models project it up to the hidden size."""
    layers: int
    kv_heads: int
    """Number of key and value heads; below the number of query heads in grouped-query attention."""
    head_dim: int
    max_positions: int | None
    """Longest sequence in tokens, or None where the model's configuration gives none."""
    no_embeddings: str | None = None
    """Reason why virtual tokens cannot be given as embeddings; None where they can."""
    no_prefix: str | None = None
    """Reason why keys and values of virtual tokens have no place in some layer; None where each layer takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture(SiteSurvey):
    """Sites, tensors and sizes of a base; read from the meta device as well."""

    kind: str
    """Name of the model class."""
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    """Parameter name -> shape; a tied parameter is listed once, under its first name."""
    norm_tensors: frozenset[str] = frozenset()
    """Names of the tensors of normalisation layers, as in `tensors`."""
    head: tuple[str, ...] = ()
    """Names of the tensors of the output head, as in `tensors`."""
    head_tied: bool = False
    """Mark of an output head that shares its weight with the input embedding."""
    transposed: frozenset[str] = frozenset()
    """Names of the sites that store their weight as (in, out): GPT-2's Conv1D."""
    decoder: Decoder | None = None
    """Decoder sizes, or None where the model is not a causal language model."""

    def untried_by(self, *, text: bool) -> frozenset[str]:
        """Return the names of sites that inputs may not reach: with text alone, all of a model of several towers."""
        several = len({site.tower for site in self.sites}) > 1
        return frozenset(site.name for site in self.sites) if text and several else self.untried

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of all bias vectors, including those of normalisation layers."""
        return tuple(name for name in self.tensors if name.rpartition(".")[2].endswith("bias"))


def size(shape: Shape) -> int:
    """Return the number of elements of a tensor."""
    return math.prod(shape)
