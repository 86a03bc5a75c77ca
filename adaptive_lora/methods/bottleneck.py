"""Bottleneck adapters: a narrow perceptron with a skip connection, after sublayers of each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptive_lora.allocation.architecture import Architecture, Shape, size
from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.base import TunerMethod, largest
from adaptive_lora.options import Limits, option

_NONLINEARITY = Limits(choices=("relu", "gelu", "silu", "tanh"))


@dataclass(frozen=True, kw_only=True)
class _Bottleneck(TunerMethod):
    """Bottlenecks after the sites of some roles."""

    roles: ClassVar[tuple[Role, ...]]
    width: int | None = option(
        None, "width of the bottleneck; none: the largest within the budget, or by reduction", limits=Limits(low=1)
    )
    reduction: float = option(
        16.0, "ratio of hidden size to width, where neither width nor budget is given", limits=Limits(low=1)
    )
    nonlinearity: str = option("gelu", "activation function between down and up projection", limits=_NONLINEARITY)
    norms: bool = option(True, "also train the normalisation layers")

    def label_under(self, budget: str | None) -> str:
        """Return `w8`, with every option that is not the default."""
        default = type(self)()
        parts = []
        if self.width is not None:
            parts.append(f"w{self.width}")
        elif budget is None:
            parts.append(f"red{self.reduction:g}")
        if self.nonlinearity != default.nonlinearity:
            parts.append(self.nonlinearity)
        if self.norms != default.norms:
            parts.append("norms" if self.norms else "nonorms")
        return "-".join(parts)

    def design(self, base: Architecture, budget: int | None, method: str) -> TunerPlan:
        """Return two matrices and two biases per place, and the normalisation layers if they are trained."""
        places = [site for site in base.sites if site.role in self.roles]
        found = {site.role for site in places}
        if found != set(self.roles):
            lacking = ", ".join(sorted(set(self.roles) - found))
            raise AllocationError(f"{method}: {base.kind} has no linear layer of role {lacking}; required some.")
        norms = {name: shape for name, shape in base.tensors.items() if self.norms and name in base.norm_tensors}
        widths = self._widths(places, sum(map(size, norms.values())), budget)
        tensors: dict[str, Shape] = {}
        for site in places:
            width, hidden = widths[site.name], site.out_features
            tensors |= {
                f"{site.name}.bottleneck.down.weight": (width, hidden),
                f"{site.name}.bottleneck.down.bias": (width,),
                f"{site.name}.bottleneck.up.weight": (hidden, width),
                f"{site.name}.bottleneck.up.bias": (hidden,),
            }
        return TunerPlan(
            method=method,
            family=self.name,
            settings={"bottlenecks": widths, "nonlinearity": self.nonlinearity},
            tensors={**tensors, **norms},
            budget=budget,
        )

    def _widths(self, places: Sequence[AdapterSite], norms: int, budget: int | None) -> dict[str, int]:
        """Return the width at each place: equal everywhere, unless it is derived from the hidden size."""

        def cost(width: int) -> int:
            return norms + sum(width * (2 * place.out_features + 1) + place.out_features for place in places)

        if self.width is not None:
            width = self.width
        elif budget is not None:
            width = largest(cost, budget, f"unit of {len(places)} bottlenecks")
        else:
            return {place.name: max(1, int(place.out_features // self.reduction)) for place in places}
        return dict.fromkeys((place.name for place in places), width)


@dataclass(frozen=True, kw_only=True)
class Houlsby(_Bottleneck):
    """Adapters after attention and after the feed-forward part (Houlsby et al. 2019, 1902.00751).

    Each is placed right after the projection back to the hidden size, before dropout and the skip
    connection (section 2.1; the authors' code has it after dropout). As in the paper, the
    normalisation layers are trained too. An adapter starts as exactly the identity; the paper draws
    W_up from a normal distribution of standard deviation 0.01.
    """

    name: ClassVar[str] = "houlsby"
    roles: ClassVar[tuple[Role, ...]] = (Role.OUTPUT, Role.DOWN)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(_Bottleneck):
    """Adapters after the feed-forward part only (AdapterFusion, Pfeiffer et al. 2020, 2005.00247).

    Departure: the adapter is inside the skip connection in every model. The paper's place, after the
    layer norm at the end of a block, exists only in post-norm models (BERT).
    """

    name: ClassVar[str] = "pfeiffer"
    roles: ClassVar[tuple[Role, ...]] = (Role.DOWN,)
    nonlinearity: str = option("relu", "activation function between down and up projection", limits=_NONLINEARITY)
    norms: bool = option(False, "also train the normalisation layers")
