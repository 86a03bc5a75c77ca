"""Inputs and output gradients of adapter sites, captured one site at a time.

The base stays frozen: no weight requires a gradient. One hook keeps a site's input, another receives
the gradient of its output; a statistic is computed from both, and both are released. Where all
calibration batches fit into one pass, a site's statistic is complete when its gradient arrives, so
one site's statistic is held at a time. Otherwise the statistics of all sites are held together, or, where they
would take more than the task's room, those of groups of sites, each with passes of its own. The model runs as in
training: on packed rows where the task does, so that no work is done for padding.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.data import Batch
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance.contract import ZERO, Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.experts import ExpertRows, summed, units_of, watched_experts
from adaptive_lora.methods.importance.passes import Pass, grouped, halved
from adaptive_lora.models.kernels import attends_packed

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRows:
    """Inputs and gradients of one pass at one site: N rows, example after example."""

    inputs: torch.Tensor
    """Inputs of the site, shape (N, in), float32."""
    gradients: torch.Tensor
    """Gradients of the summed loss by the output, shape (N, out), float32; (N, 0) in forward passes."""
    mask: torch.Tensor
    """Mask of rows that are not padding, shape (N,)."""
    lengths: Sequence[int]
    """Number of rows of each example."""
    split: int
    """Index of the first example of the second half of the calibration data."""
    tokens: tuple[int, int]
    """Number of supervised tokens of each half."""
    shared: dict[str, torch.Tensor]
    """Values computed from the inputs alone, for the sites that have the same ones."""

    @property
    def halves(self) -> tuple[slice, slice]:
        """Slices of the rows of the first and of the second half."""
        first = sum(self.lengths[: self.split])
        return slice(0, first), slice(first, None)

    def of_inputs(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a value of the inputs, computed once for all sites that have the same inputs one after another."""
        if name not in self.shared:
            self.shared[name] = compute()
        return self.shared[name]


_CROSS = re.compile(r"encdec|encoder_attn|cross", re.IGNORECASE)
_IMAGES = re.compile(r"vision|visual|image", re.IGNORECASE)
"""Pattern of names of towers whose positions are image patches, to which no text mask applies."""

Measures = Sequence[SiteMeasure]
"""Measures of one site on all calibration data, on the first half and on the second half."""


class Statistic(Protocol[T_co]):
    """Statistic of one site, accumulated over passes."""

    def add(self, rows: SiteRows) -> None:
        """Add one pass."""

    def finish(self) -> T_co:
        """Return the result, usually the measures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found(Generic[T]):
    """Results of the sites that were reached."""

    results: Mapping[str, T]
    """Name of a linear layer or expert -> its result."""
    tokens: int
    """Number of tokens run through the model, without padding."""


def site_results(
    task: ProfileTask,
    make: Callable[[AdapterSite], Statistic[T]],
    *,
    floats: Callable[[AdapterSite], int],
    backward: bool = True,
) -> Found[T]:
    """Compute every site's statistic on the calibration data.

    Args:
        task: model, sites and calibration data.
        make: function that makes the empty statistic of a site.
        floats: function from a site to the number of floats in its statistic.
        backward: whether gradients are needed, or inputs alone.
    """
    limits = task.limits
    passes = halved(task.batches, limits.backward_tokens if backward else limits.forward_tokens, divide=True)
    units = [unit for site in task.sites for unit in units_of(site)]
    room = 3 * sum(unit.in_features * unit.out_features for unit in units) if limits.room is None else limits.room
    groups = [units] if len(passes) == 1 else grouped(units, floats, room)
    found: dict[str, T] = {}
    with frozen(task.model), task.running(task.model):
        for group in groups:
            sites, alive = {site.name: site for site in group}, dict[str, Statistic[T]]()

            def take(name: str, rows: SiteRows) -> None:
                statistic = alive.pop(name, None) or make(sites[name])  # noqa: B023
                statistic.add(rows)
                if len(passes) == 1:
                    found[name] = statistic.finish()
                else:
                    alive[name] = statistic  # noqa: B023

            for part in passes:
                _Run(task, part, sites, take).run(backward=backward)
            while alive:
                name, statistic = alive.popitem()
                found[name] = statistic.finish()
    return Found(results=found, tokens=len(groups) * sum(part.batch.tokens for part in passes))


def measurement(task: ProfileTask, found: Mapping[str, Measures], tokens: int) -> Measurement:
    """Return the measurement of all sites from the measures of those that were reached; the others score zero."""
    nothing = (ZERO, ZERO, ZERO)
    whole, *halves = (
        {site.name: summed([found.get(unit.name, nothing)[part] for unit in units_of(site)]) for site in task.sites}
        for part in range(3)
    )
    unrouted = tuple(u.name for site in task.sites if site.experts for u in units_of(site) if u.name not in found)
    return Measurement(whole=whole, halves=tuple(halves), processed_tokens=tokens, unrouted=unrouted)


def measure_sites(
    task: ProfileTask,
    make: Callable[[AdapterSite], Statistic[Measures]],
    *,
    floats: Callable[[AdapterSite], int],
    backward: bool = True,
) -> Measurement:
    """Compute every site's measures on the calibration data, with the arguments of `site_results`."""
    found = site_results(task, make, floats=floats, backward=backward)
    return measurement(task, found.results, found.tokens)


class _Run:
    """One pass through the model; each site's rows are passed on when they are complete."""

    def __init__(
        self, task: ProfileTask, part: Pass, sites: Mapping[str, AdapterSite], take: Callable[[str, SiteRows], None]
    ) -> None:
        self.task, self.sites, self.take, self.split = task, sites, take, part.split
        self.batch = part.batch.to(task.runtime.device)
        supervised = self.batch.supervised_by_example
        self.tokens = int(supervised[: part.split].sum()), int(supervised[part.split :].sum())
        self.packed = [int(n) for n in self.batch.attention_mask.sum(dim=1)] if attends_packed(task.model) else None
        self.inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.gradients: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.routed: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.rows = 0
        self.last: _Last | None = None

    def run(self, *, backward: bool) -> None:
        """Run the model, and pass on the rows of every site that was called."""
        modules = dict(self.task.model.named_modules())
        stacks = dict.fromkeys(name.partition("[")[0] for name in self.sites if name not in modules)
        with ExitStack() as hooks:
            for name in self.sites.keys() & modules.keys():
                handle = modules[name].register_forward_hook(self._hook(name, backward))
                hooks.callback(handle.remove)
            hooks.enter_context(watched_experts(self.task.model, stacks, partial(self._routed, backward)))
            with torch.set_grad_enabled(backward), self.task.runtime.autocast():
                loss = self.task.loss(self.task.model, self.batch)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the base's loss on the calibration data is {loss.item()}; required a finite one. "
                "Use precision bf16 or fp32, or check the weights."
            )
        if backward:
            loss.backward()
        else:
            for name in list(self.inputs):
                self._hand_on(name, [rows.new_zeros(*rows.shape[:-1], 0) for rows in self.inputs[name]])

    def _hook(self, name: str, backward: bool) -> Any:
        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            return self._kept(name, inputs[0].detach(), output, backward)

        return keep

    def _routed(self, backward: bool, rows: ExpertRows, output: torch.Tensor) -> torch.Tensor:
        if rows.unit not in self.sites:  # measured in another group
            return output
        self._lengths(rows.unit, rows.total)
        self.routed[rows.unit].append(rows.tokens)
        self.rows = rows.total
        return self._kept(rows.unit, rows.inputs, output, backward)

    def _kept(self, name: str, inputs: torch.Tensor, output: torch.Tensor, backward: bool) -> torch.Tensor:
        """Keep the inputs of a call, and return its output with a hook on its gradient."""
        call = len(self.inputs[name])
        self.inputs[name].append(inputs)
        if not backward:
            return output
        if not output.requires_grad:  # no parameter before it is trained, so the graph starts here
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: self._arrive(name, call, gradient))
        return output

    def _arrive(self, name: str, call: int, gradient: torch.Tensor) -> None:
        """Store an output gradient; a module that ran several times is complete after its last one."""
        arrived = self.gradients[name]
        arrived[call] = gradient.detach()
        if len(arrived) == len(self.inputs[name]):
            self._hand_on(name, [arrived[index] for index in sorted(arrived)])
            del self.gradients[name]

    def _hand_on(self, name: str, gradients: list[torch.Tensor]) -> None:
        if not all(torch.isfinite(rows.sum(dtype=torch.float32)) for rows in gradients):
            raise ModelError(
                f"the gradient at {name} is not finite; required a finite one. Use precision bf16 or fp32."
            )
        kept = self.inputs.pop(name)
        if name in self.routed:
            calls = [self._of_expert(name, *call) for call in zip(kept, gradients, self.routed[name], strict=True)]
        else:
            calls = [self._of_layer(name, *call) for call in zip(kept, gradients, strict=True)]
        inputs, outputs, mask, lengths = calls[0] if len(calls) == 1 else _by_example(calls)
        last = self.last
        if last is None or len(calls) > 1 or not (_same(last.given, kept[0]) and torch.equal(last.mask, mask)):
            last = self.last = _Last(given=kept[0], inputs=inputs, mask=mask)
        self.take(
            name,
            SiteRows(
                inputs=last.inputs, gradients=outputs, mask=mask, lengths=lengths, split=self.split,
                tokens=self.tokens, shared=last.shared,
            ),
        )  # fmt: skip

    def _of_layer(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> _Call:
        """Return the rows of a call; some models have flattened examples and positions already."""
        count = inputs.shape[:-1].numel()
        lengths = self._lengths(name, count)
        if self.packed is None:
            shaped = inputs.reshape(self.batch.examples, -1, inputs.shape[-1])
            mask = positions_mask(self.batch, self.sites[name], shaped).flatten()
        else:
            mask = torch.ones(count, dtype=torch.bool, device=inputs.device)
        same = self.last is not None and _same(self.last.given, inputs)
        rows = self.last.inputs if same and self.last is not None else inputs.float().flatten(0, -2)
        return rows, gradients.float().flatten(0, -2), mask, lengths

    def _of_expert(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor, tokens: torch.Tensor) -> _Call:
        """Return the rows of an expert in the order of their tokens."""
        lengths = torch.tensor(self._lengths(name, self.rows), device=tokens.device)
        owners = torch.repeat_interleave(lengths)
        every = torch.ones(self.rows, dtype=torch.bool, device=tokens.device)
        if self.packed is None:
            shaped = torch.empty(self.batch.examples, len(every) // self.batch.examples, 0, device=tokens.device)
            every = positions_mask(self.batch, self.sites[name], shaped).flatten()
        order = torch.argsort(tokens, stable=True)
        counts = torch.bincount(owners[tokens], minlength=self.batch.examples)
        return inputs.float()[order], gradients.float()[order], every[tokens][order], counts.tolist()

    def _lengths(self, name: str, rows: int) -> list[int]:
        """Return how many of the rows of a call belong to each example."""
        examples = self.batch.examples
        if self.packed is not None and rows == sum(self.packed):
            return self.packed
        if self.packed is not None or rows % examples:
            wanted = "a multiple" if self.packed is None else f"the {sum(self.packed or ())} of their tokens"
            raise ModelError(
                f"{name} sees {rows} rows for {examples} examples; required {wanted}, so that rows can be assigned to "
                "examples."
            )
        return [rows // examples] * examples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Last:
    """Inputs of the site that was passed on last, which query, key and value or gate and up share."""

    given: torch.Tensor
    """Inputs as the module got them."""
    inputs: torch.Tensor
    mask: torch.Tensor
    shared: dict[str, torch.Tensor] = field(default_factory=dict)


_Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]]
"""Inputs, gradients and mask of the rows of a call, and the number of rows of each example."""


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors, both alive, are views of the same numbers."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


def _by_example(calls: Sequence[_Call]) -> _Call:
    """Join the rows of several calls example by example."""
    lengths = [sum(each) for each in zip(*(call[3] for call in calls), strict=True)]

    def together(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        split = (each.split(list(call[3])) for each, call in zip(rows, calls, strict=True))
        return torch.cat([part for parts in zip(*split, strict=True) for part in parts])

    inputs, gradients, masks = ([call[0] for call in calls], [call[1] for call in calls], [call[2] for call in calls])
    return together(inputs), together(gradients), together(masks), lengths


def positions_mask(batch: Batch, site: AdapterSite, rows: torch.Tensor) -> torch.Tensor:
    """Return the mask (B, T) of a site's positions that are not padding; all true where unknown.

    Args:
        batch: batch that went through the model.
        site: site of the rows; keys and values of cross-attention have the encoder's positions.
        rows: inputs of the site, shape (B, T, in).
    """
    cross = site.role in (Role.KEY, Role.VALUE) and _CROSS.search(site.name)
    names = ["attention_mask"]
    if site.tower == "decoder" and not cross:
        names.insert(0, "decoder_attention_mask")
    if not _IMAGES.search(site.tower):
        for mask in (batch.inputs[name] for name in names if name in batch.inputs):
            if mask.shape == rows.shape[:2]:
                return mask.bool().to(rows.device)
    return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients of parameters inside the block; restore both afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter, required in wanted:
            parameter.requires_grad_(required)
        for module, mode in modes:
            module.training = mode
