"""Inputs and output gradients of adapter sites, captured one site at a time.

The base stays frozen: no weight requires a gradient. One hook keeps a site's input, another receives
the gradient of its output; a statistic is computed from both, and both are released. Where all
calibration batches fit into one pass, a site's statistic is complete when its gradient arrives, so
one site's statistic is held at a time. Otherwise sites are measured in groups whose statistics
together take no more memory than the model's own gradient would.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.data import Batch, stacked
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance.contract import ZERO, Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.experts import ExpertRows, by_example, summed, units_of, watched_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteRows:
    """Inputs and gradients of B examples of T positions in one pass at one site."""

    inputs: torch.Tensor
    """Inputs of the site, shape (B, T, in), float32."""
    gradients: torch.Tensor
    """Gradients of the summed loss by the output, shape (B, T, out), float32; (B, T, 0) in forward passes."""
    mask: torch.Tensor
    """Mask of positions that are not padding, shape (B, T)."""
    split: int
    """Index of the first example of the second half of the calibration data."""
    tokens: torch.Tensor
    """Number of supervised tokens per example, shape (B,)."""

    @property
    def halves(self) -> tuple[slice, slice]:
        """Slices of the examples of the first and of the second half."""
        return slice(0, self.split), slice(self.split, None)


PASS_TOKENS = 4096
"""Most padded tokens of one pass: calibration batches are joined up to it. Activations of a pass
are held at once, as in a training step; a longer batch is a pass of its own."""
_CROSS = re.compile(r"encdec|encoder_attn|cross", re.IGNORECASE)
_IMAGES = re.compile(r"vision|visual|image", re.IGNORECASE)
"""Pattern of names of towers whose positions are image patches, to which no text mask applies."""

Measures = Sequence[SiteMeasure]
"""Measures of one site on all calibration data, on the first half and on the second half."""


class Statistic(Protocol):
    """Statistic of one site, accumulated over passes."""

    def add(self, rows: SiteRows) -> None:
        """Add one pass."""

    def finish(self) -> Measures:
        """Return the measures."""


def measure_sites(
    task: ProfileTask,
    make: Callable[[AdapterSite], Statistic],
    *,
    floats: Callable[[AdapterSite], int],
    backward: bool = True,
) -> Measurement:
    """Compute every site's statistic on the calibration data.

    Args:
        task: model, sites and calibration data.
        make: function that makes the empty statistic of a site.
        floats: function from a site to the number of floats in its statistic.
        backward: whether gradients are needed, or inputs alone.
    """
    passes = halved(task.batches)
    units = [unit for site in task.sites for unit in units_of(site)]
    own = sum(unit.in_features * unit.out_features for unit in units)
    groups = [units] if len(passes) == 1 else _groups(units, floats, own)
    found: dict[str, Measures] = {}
    with frozen(task.model):
        for group in groups:
            sites, alive = {site.name: site for site in group}, dict[str, Statistic]()

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
    nothing = (ZERO, ZERO, ZERO)
    whole, *halves = (
        {site.name: summed([found.get(unit.name, nothing)[part] for unit in units_of(site)]) for site in task.sites}
        for part in range(3)
    )
    tokens = len(groups) * sum(part.batch.tokens for part in passes)
    unrouted = tuple(u.name for site in task.sites if site.experts for u in units_of(site) if u.name not in found)
    return Measurement(whole=whole, halves=tuple(halves), processed_tokens=tokens, unrouted=unrouted)


def _groups(sites: Sequence[AdapterSite], floats: Callable[[AdapterSite], int], limit: int) -> list[list[AdapterSite]]:
    """Divide sites into groups whose statistics have at most `limit` floats, or that are a single site."""
    groups: list[list[AdapterSite]] = []
    held = limit
    for site in sites:
        if held + floats(site) > limit:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += floats(site)
    return groups


class _Run:
    """One pass through the model; each site's rows are passed on when they are complete."""

    def __init__(
        self, task: ProfileTask, part: Pass, sites: Mapping[str, AdapterSite], take: Callable[[str, SiteRows], None]
    ) -> None:
        self.task, self.sites, self.take, self.split = task, sites, take, part.split
        self.batch = part.batch.to(task.runtime.device)
        self.tokens = self.batch.supervised_by_example
        self.inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.gradients: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.routed: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.positions = 0

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
                self._hand_on(name, [torch.empty(0, device=loss.device) for _ in self.inputs[name]])

    def _hook(self, name: str, backward: bool) -> Any:
        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            return self._kept(name, inputs[0].detach(), output, backward)

        return keep

    def _routed(self, backward: bool, rows: ExpertRows, output: torch.Tensor) -> torch.Tensor:
        if rows.unit not in self.sites:  # measured in another group
            return output
        if rows.total % self.batch.examples:
            raise ModelError(
                f"{rows.unit} sees the tokens of {rows.total} places for {self.batch.examples} examples; required a "
                "multiple, so that rows can be assigned to examples."
            )
        self.routed[rows.unit].append(rows.tokens)
        self.positions = rows.total // self.batch.examples
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
            inputs, outputs, masks = self._of_expert(name, kept, gradients)
        else:
            inputs = [self._by_example(name, rows) for rows in kept]
            outputs = [self._by_example(name, rows) for rows in gradients]
            masks = [positions_mask(self.batch, self.sites[name], rows) for rows in inputs]
        self.take(
            name,
            SiteRows(
                inputs=_joint(inputs),
                gradients=_joint(outputs),
                mask=_joint(masks),
                split=self.split,
                tokens=self.tokens,
            ),
        )

    def _of_expert(
        self, name: str, inputs: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Return an expert's inputs, gradients and masks by example, padded with zeros that the mask leaves out."""
        examples, positions = self.batch.examples, self.positions
        every = torch.empty(examples, positions, 0, device=inputs[0].device)
        mask = positions_mask(self.batch, self.sites[name], every).flatten()
        found: tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] = ([], [], [])
        for rows, back, tokens in zip(inputs, gradients, self.routed[name], strict=True):
            back = back if back.numel() else rows.new_zeros(len(rows), 0)
            for values, kept in zip((rows.float(), back.float(), mask[tokens, None]), found, strict=True):
                kept.append(by_example(values, tokens, examples, positions))
        return found[0], found[1], [each[..., 0] for each in found[2]]

    def _by_example(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return rows as (B, positions, features); some models flatten the first two."""
        examples = self.batch.examples
        if rows.numel() == 0:
            return rows.new_zeros(examples, 1, 0)
        if rows.shape[:-1].numel() % examples:
            raise ModelError(
                f"{name} sees {rows.shape[:-1].numel()} rows for {examples} examples; required a "
                "multiple, so that rows can be assigned to examples."
            )
        return rows.float().reshape(examples, -1, rows.shape[-1])


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


def _joint(calls: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate the positions of several calls; a single call is not copied."""
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=1)


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


# Passes: merged calibration batches, with every second example in the second half.


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Examples of one forward pass."""

    batch: Batch
    split: int
    """Index of the first example of the second half of the calibration data."""

    def half(self, second: int) -> Batch | None:
        """Return the examples of a half, or None if there are none."""
        chosen = self.batch.rows(slice(self.split, None) if second else slice(0, self.split))
        return chosen if chosen.examples else None


def joined(batches: Sequence[Batch], limit: int | None = None) -> list[Batch]:
    """Merge batches up to `limit` (4,096) padded tokens; a longer batch is kept separate."""
    return [each.batch for each in halved(batches, limit)]


def halved(batches: Sequence[Batch], limit: int | None = None) -> list[Pass]:
    """Merge batches into passes of at most `limit` (4,096) padded tokens, or of one batch.

    Counted over all batches, every second example belongs to the second half; in a pass, those of the
    first half come first. A batch that is `whole` is not divided, and every second such batch belongs
    to the second half.
    """
    if any(batch.whole for batch in batches):
        return [Pass(batch=batch, split=0 if index % 2 else batch.examples) for index, batch in enumerate(batches)]
    most = PASS_TOKENS if limit is None else limit
    groups: list[list[Batch]] = []
    width = rows = 0
    for batch in batches:
        count, length = batch.examples, batch.positions
        width, rows = max(width, length), rows + count
        if not groups or width * rows > most:
            groups.append([])
            width, rows = length, count
        groups[-1].append(batch)
    passes, seen = [], 0
    for batch in map(stacked, groups):
        order = sorted(range(batch.examples), key=lambda index: (seen + index) % 2)
        passes.append(Pass(batch=batch.rows(order), split=(batch.examples + (seen + 1) % 2) // 2))
        seen += batch.examples
    return passes
