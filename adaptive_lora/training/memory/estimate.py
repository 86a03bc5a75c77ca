"""The memory of LoRA training, counted site by site.

    memory = weights + adapters + activations + head + work

- *weights*: the frozen base's weights: 4 bytes each in fp32, 2 in bf16, a little over half a byte in NF4.
- *adapters*: 16 bytes per trained parameter: itself, its gradient, and AdamW's m and v, in fp32.
- *activations*: values of the forward pass that the backward pass needs, numbers per token and block:

      2 h           inputs of the two norms
    + in            input of each adapted layer; layers with the same input share it
    + q + k + v     outputs of query, key and value, for the backward pass of attention
    + o             its output
    + f             input of the activation function (3 f where a gate multiplies: gate, silu, up)
    + sum of r      outputs of A

  Of routed experts, each token keeps those of the active ones. PEFT adapts their weights by adding B A to a copy of
  all of them in every forward pass, which the backward pass needs too.
  A frozen layer's input is not needed, because its weight has no gradient. Flash and memory-efficient
  attention keep no attention weights. With checkpointing a block keeps its input, h, and one block at
  a time keeps the rest.
- *head*: logits of one chunk in fp32, twice (a CPU's tiles are smaller), and the gradient of the
  last hidden states. With padded batches, the logits of all tokens exist at once, four times: as
  logits, their logarithms, and the gradients of both.
- *work*: temporary values of one block: the gradients of the backward pass, three times the widest
  activation, and of a base in 4 bit the largest layer's dequantised weight.

h: width of the block, f: width inside the feed-forward part, r: rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.config import TrainConfig, shown
from adaptive_lora.errors import ConfigError

ADAPTER_BYTES = 16
HEAD_CHUNK = 2**23
"""Number of logits held at once where the loss is computed in chunks."""
SPREAD = 1.3
"""Ratio of the upper to the expected estimate of all but the base's weights, for allocator
fragmentation and library buffers."""
_READS_BLOCK = (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Sizes of a training that determine its memory."""

    sites: Sequence[AdapterSite]
    """All sites of the base."""
    ranks: Mapping[str, int]
    """Site name -> rank; other sites have no adapter."""
    weights: int
    """Bytes of the frozen base's weights."""
    trained_parameters: int
    vocabulary: int
    """Width of the output head; 0 without one."""
    number_bytes: int
    """Bytes of an activation: 4 in fp32, 2 in bf16."""
    longest: int
    """Number of tokens of the longest example."""
    copies: Sequence[int] = ()
    """Bytes of the weights in each block that PEFT adapts by copies, which the backward pass needs: experts'."""
    dequantised: int = 0
    """Bytes of the largest layer in 4 bit, dequantised; 0 for a base that is not in 4 bit."""
    whole_logits: bool = False
    """Way of computing the loss: from all logits at once if true, else in chunks."""
    spelled_activation: bool = False
    """Mark of an activation function computed in elementary steps, as GPT-2's GELU in
    transformers: it then keeps four tensors instead of one."""

    @cached_property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """Numbers per token that each block keeps: its input, and all that its backward pass needs."""
        blocks = _blocks(self.sites)
        return tuple(
            (_width(sites), activation_numbers(sites, self.ranks) + self.spelled_activation * _spelled(sites))
            for sites in blocks
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Components of the memory of a training, in bytes."""

    weights: int
    adapters: int
    activations: int
    head: int
    work: int

    @property
    def needed(self) -> int:
        """Lower bound for any implementation, in bytes: weights, adapters and activations."""
        return self.weights + self.adapters + self.activations

    @property
    def expected(self) -> int:
        """Expected peak, in bytes."""
        return self.needed + self.head + self.work

    @property
    def share(self) -> int:
        """Bytes in addition to the base's weights: the share of each trial where several train together."""
        return self.expected - self.weights

    @property
    def high(self) -> int:
        """Upper estimate of the peak, in bytes."""
        return self.weights + int(SPREAD * self.share)

    def to_dict(self) -> dict[str, int]:
        """Return bytes by component, and low, expected and high totals."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return {**parts, "low": self.needed, "expected": self.expected, "high": self.high}


def estimate(load: Load, *, examples: int, checkpointing: bool) -> Estimate:
    """Return the estimated memory of a training.

    Args:
        load: sizes that determine the memory.
        examples: number of examples per forward pass, each taken to be as long as the longest.
        checkpointing: whether activations are recomputed in the backward pass.
    """
    tokens, size = examples * load.longest, load.number_bytes
    widths, blocks = zip(*load.kept, strict=True)
    copied = max if checkpointing else _total
    numbers = sum(widths) + max(blocks) if checkpointing else sum(blocks)
    widest = max(max(site.in_features, site.out_features) for site in load.sites)
    chunk = min(tokens, max(16, HEAD_CHUNK // max(1, load.vocabulary)))
    logits = 4 * tokens if load.whole_logits else 2 * chunk
    return Estimate(
        weights=load.weights,
        adapters=load.trained_parameters * ADAPTER_BYTES,
        activations=tokens * numbers * size + copied(load.copies, default=0),
        head=4 * logits * load.vocabulary + 2 * tokens * widths[-1] * size,
        work=3 * tokens * widest * size + load.dequantised,
    )


def _total(numbers: Iterable[int], default: int) -> int:
    return sum(numbers, default)


def activation_numbers(sites: Sequence[AdapterSite], ranks: Mapping[str, int]) -> int:
    """Return how many numbers per token a block keeps for the backward pass."""
    by_role: dict[Role, list[AdapterSite]] = defaultdict(list)
    for site in sites:
        by_role[site.role].append(site)
    inside = [site for role in _READS_BLOCK for site in by_role[role]]
    outputs, gates, ups = by_role[Role.OUTPUT], by_role[Role.GATE], by_role[Role.UP]
    known = {*_READS_BLOCK, Role.OUTPUT, Role.GATE, Role.UP, Role.DOWN}
    adapted = [site for site in sites if ranks.get(site.name, 0)]
    numbers = 2 * _width(sites)
    numbers += _inputs(adapted, inside) + _inputs(adapted, [*gates, *ups])
    numbers += _inputs(adapted, by_role[Role.DOWN])
    numbers += sum(site.out_features for site in inside)
    numbers += sum(site.in_features for site in outputs)  # its input is the output of attention
    numbers += sum(2 * site.out_features for site in gates)
    numbers += sum(site.active * site.out_features for site in ups)
    for site in sites:  # unknown roles: input and output
        if site.role not in known:
            numbers += site.in_features + site.out_features
    return numbers + sum(site.active * ranks.get(site.name, 0) for site in sites)


def _spelled(sites: Sequence[AdapterSite]) -> int:
    """Return the additional numbers kept by an activation function in elementary steps."""
    return 3 * sum(site.out_features for site in sites if site.role == Role.UP)


def _inputs(adapted: Sequence[AdapterSite], readers: Sequence[AdapterSite]) -> int:
    """Return the width of the input that some layers share, if one of them is adapted."""
    return max((site.active * site.in_features for site in readers if site in adapted), default=0)


def _width(sites: Sequence[AdapterSite]) -> int:
    """Return the width of a block: the input size of its first layer."""
    return sites[0].in_features


def _blocks(sites: Iterable[AdapterSite]) -> list[list[AdapterSite]]:
    blocks: dict[tuple[str, int], list[AdapterSite]] = defaultdict(list)
    for site in sites:
        blocks[site.tower, site.layer].append(site)
    return list(blocks.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryChoice:
    """Settings that keep a training within a memory limit."""

    micro_batch: int
    """Number of examples per forward pass."""
    checkpointing: bool
    estimate: Estimate
    whole: Estimate
    """Estimate for the whole batch in one forward pass, without checkpointing."""


def choose(load: Load, config: TrainConfig) -> MemoryChoice:
    """Return the largest micro-batch whose upper estimate is within the limit, if there is one.

    Args:
        load: sizes that determine the memory.
        config: batch size, limit, and checkpointing, which is kept if the user set it.

    Raises:
        ConfigError: not even one example fits with checkpointing.
    """
    limit, asked = config.max_memory, config.gradient_checkpointing
    choice = fit(load, config.batch_size, limit=limit, checkpointing=asked)
    if choice is not None:
        return choice
    least = estimate(load, examples=1, checkpointing=True)
    raise ConfigError(
        f"max_memory {shown(limit or 0)} is too little: one example of {load.longest} tokens with "
        f"gradient checkpointing takes up to {shown(least.high)}, of which {shown(least.weights)} "
        "are the base's weights. Raise it, lower max_tokens, or use bf16 or a smaller base."
    )


def fit(load: Load, batch_size: int, *, limit: float | None, checkpointing: bool) -> MemoryChoice | None:
    """Return the largest micro-batch whose upper estimate is within a limit; None: not even one example fits.

    A smaller micro-batch costs only kernel launches; recomputing activations costs a forward pass, a
    third of the time. So checkpointing is chosen only if not even one example fits without it.

    Args:
        load: sizes that determine the memory.
        batch_size: number of examples of a batch.
        limit: bytes; None: no limit.
        checkpointing: whether to use it in any case.
    """
    whole = estimate(load, examples=batch_size, checkpointing=False)
    for recompute in (True,) if checkpointing else (False, True):
        size = batch_size
        while size >= 1:
            found = estimate(load, examples=size, checkpointing=recompute)
            if limit is None or found.high <= limit:
                return MemoryChoice(micro_batch=size, checkpointing=recompute, estimate=found, whole=whole)
            size //= 2
    return None


def describe(choice: MemoryChoice, load: Load) -> str:
    """Return a sentence on the memory of a training."""
    found = choice.estimate
    plural = "" if choice.micro_batch == 1 else "s"
    return (
        f"{shown(found.expected)} expected, {shown(found.needed)} at least, {shown(found.high)} at "
        f"most: {choice.micro_batch} example{plural} of {load.longest} tokens per forward pass, "
        f"{'with' if choice.checkpointing else 'without'} gradient checkpointing, "
        f"base {shown(found.weights)}, trained parameters {shown(found.adapters)}"
    )
