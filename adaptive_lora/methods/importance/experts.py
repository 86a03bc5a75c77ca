"""Routed experts in profiles: each is measured as a linear layer of its own, and a stack of them has the sums.

One rank of a stack is one rank at each of its experts, so that gains add up over them, as costs do. transformers'
plain code of experts multiplies the rows of one expert at a time by its slice of the weights; these products are
watched. An expert that no row reaches scores zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance.contract import SiteMeasure

_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_ROUTES = ("top_k_index", "router_indices")
"""Names of the argument of experts that holds the experts of each token."""


def units_of(site: AdapterSite) -> tuple[AdapterSite, ...]:
    """Return the matrices of a site as sites of their own: a linear layer itself, or each expert as `NAME[index]`."""
    if not site.experts:
        return (site,)
    return tuple(
        dataclasses.replace(site, name=f"{site.name}[{expert}]", experts=0, active=1) for expert in range(site.experts)
    )


def summed(measures: Sequence[SiteMeasure]) -> SiteMeasure:
    """Return the sums of scores and of each component of spectra over the matrices of a site."""
    spectra = zip_longest(*(measure.spectrum for measure in measures), fillvalue=0.0)
    return SiteMeasure(score=sum(measure.score for measure in measures), spectrum=tuple(map(sum, spectra)))


def stack_of(modules: Mapping[str, nn.Module], name: str) -> tuple[Any, torch.Tensor]:
    """Return the module of a stack and its 3-D parameter."""
    owner, _, leaf = name.rpartition(".")
    return modules[owner], getattr(modules[owner], leaf)


def expert_weight(modules: Mapping[str, nn.Module], unit: str) -> torch.Tensor:
    """Return the weight of one expert, shape (out, in), float32, by its name `NAME[index]`."""
    name, _, index = unit.removesuffix("]").rpartition("[")
    module, weights = stack_of(modules, name)
    weight = weights[int(index)].detach().float()
    return weight.T if module.is_transposed else weight


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRows:
    """Rows of one expert in one call."""

    unit: str
    """Name of the expert, `NAME[index]`."""
    inputs: torch.Tensor
    """Inputs, shape (rows, in)."""
    tokens: torch.Tensor
    """Index of each row's token in the batch, counted over its examples, shape (rows,)."""
    total: int
    """Number of tokens of the batch."""


Watch = Callable[[ExpertRows, torch.Tensor], torch.Tensor]
"""Function that gets an expert's rows and their output, and returns the output to continue with."""


class _Products(TorchFunctionMode):
    """Watches the products of rows with one expert's slice of a stack."""

    def __init__(self, stacks: Mapping[int, str], routes: Mapping[str, torch.Tensor], watch: Watch) -> None:
        super().__init__()
        self.stacks, self.routes, self.watch = stacks, routes, watch
        self.slices: dict[int, tuple[torch.Tensor, str, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and (name := self.stacks.get(id(args[0]))) is not None:
            self.slices[id(result)] = (result, name, int(args[1]))
        elif func in _PRODUCTS and len(args) > 1 and id(args[1]) in self.slices:
            _, name, expert = self.slices.pop(id(args[1]))
            return self._watched(name, expert, args[0], result)
        return result

    def _watched(self, name: str, expert: int, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        route = self.routes[name.rpartition(".")[0]]
        _, tokens = torch.where(route.T.eq(expert))
        if len(tokens) != len(inputs):
            raise ModelError(
                f"{name} multiplies {len(inputs)} rows by expert {expert}, and its router sends it {len(tokens)}; "
                "required experts that follow transformers' interface."
            )
        rows = ExpertRows(unit=f"{name}[{expert}]", inputs=inputs.detach(), tokens=tokens, total=len(route))
        return self.watch(rows, output)


@contextmanager
def watched_experts(model: nn.Module, names: Iterable[str], watch: Watch) -> Iterator[None]:
    """Pass the rows of every expert of some stacks on to a function, in forward passes inside the block.

    Args:
        model: model without adapters.
        names: names of the stacks.
        watch: function called for each expert that is reached, once per call and stack.
    """
    modules, names = dict(model.named_modules()), tuple(names)
    if not names:
        yield
        return
    routes: dict[str, torch.Tensor] = {}

    def keep(owner: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [kwargs[name] for name in _ROUTES if name in kwargs]
            routes[owner] = given[0] if given else args[1]

        return hook

    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    stacks = {id(stack_of(modules, name)[1]): name for name in names}
    handles = [modules[owner].register_forward_pre_hook(keep(owner), with_kwargs=True) for owner in owners]
    settings = {id(modules[owner].config): modules[owner].config for owner in owners}.values()
    before = [config._experts_implementation for config in settings]
    try:
        for config in settings:
            config._experts_implementation = "eager"
        with _Products(stacks, routes, watch):
            yield
    finally:
        for config, kind in zip(settings, before, strict=True):
            config._experts_implementation = kind
        for handle in handles:
            handle.remove()
