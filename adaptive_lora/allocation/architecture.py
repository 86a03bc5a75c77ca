"""What a base model is made of, as numbers: all that plans of any family need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_lora.allocation.site import AdapterSite

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSurvey:
    """The linear maps in the blocks of a model: which take adapters, and which do not."""

    sites: tuple[AdapterSite, ...]
    """Maps that take adapters, in module order."""
    left_out: Mapping[str, str]
    """Full module name of a map that takes none -> the reason."""
    untried: frozenset[str]
    """Names of sites of which it is not known, without weights, whether they reach the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Sizes of a causal language model that take part in virtual tokens."""

    width: int
    """Of the input embeddings; some models project them up to the hidden size."""
    layers: int
    kv_heads: int
    """Heads of keys and values: fewer than those of queries under grouped attention."""
    head_dim: int
    max_positions: int | None
    """Longest sequence, or None where the model states none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sites, tensors and sizes of a base; read from the meta device as well."""

    kind: str
    """Name of the model class."""
    sites: tuple[AdapterSite, ...]
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    """Every parameter by name, tied ones once, under the name of the first."""
    norm_tensors: frozenset[str] = frozenset()
    """Names of the tensors of normalisation layers, as in `tensors`."""
    head: tuple[str, ...] = ()
    """Names of the tensors of the output head, as in `tensors`."""
    head_tied: bool = False
    """The head's weight is also the input embedding."""
    decoder: Decoder | None = None
    """None where the model is no causal language model."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Full module name of a linear map in a block that takes no adapter -> the reason."""
    untried: frozenset[str] = frozenset()
    """Names of sites of which it is not known, without weights, whether they reach the output."""

    @property
    def survey(self) -> SiteSurvey:
        """The linear maps in the blocks, taken as sites and left out."""
        return SiteSurvey(sites=self.sites, left_out=self.left_out, untried=self.untried)

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of all bias vectors, those of normalisation layers among them."""
        return tuple(name for name in self.tensors if name.rpartition(".")[2].endswith("bias"))


def size(shape: Shape) -> int:
    """Return the number of elements of a tensor."""
    total = 1
    for side in shape:
        total *= side
    return total
