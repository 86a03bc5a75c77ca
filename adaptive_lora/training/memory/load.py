"""Sizes of a plan on a base, for the memory estimate: also before its weights are loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from adaptive_lora.allocation import Plan, RankPlan
from adaptive_lora.allocation.architecture import Shape, size
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config.types import Precision
from adaptive_lora.serving import packed_layers
from adaptive_lora.training.memory.estimate import Load
from adaptive_lora.training.memory.gpus import Storage

_BLOCK, _NESTED_BLOCK = 64, 256
"""Number of weights per scale, and of scales per second-level scale, in bitsandbytes' 4-bit format."""


def load_of(
    base: Any,
    sites: Sequence[AdapterSite],
    plan: Plan,
    *,
    precision: Precision,
    longest: int,
    fused: bool = True,
    packed: bool = True,
    head: Sequence[str] = (),
) -> Load:
    """Return the sizes of a training that determine its memory.

    Tuners without ranks are counted as if every linear layer had an adapter: their backward pass
    needs the layers' inputs too.

    Args:
        base: transformers model; its weights may be on the meta device.
        sites: all sites of the base.
        plan: plan of the trained parameters.
        precision: of the training.
        longest: number of tokens of the longest example.
        fused: whether the model runs by fused kernels.
        packed: whether examples run as packed rows, whose loss is computed in chunks.
        head: modules of the base that the task trains in addition to the plan.
    """
    number_bytes = precision.number_bytes
    trained = trained_shapes(base, plan, head)
    stored = storage_of(base, sites, packed=plan.base != BaseStorage.FULL, number_bytes=number_bytes)
    everywhere = {site.name: 1 for site in sites}
    outputs = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    text = None if outputs is None else base.config.get_text_config()
    weights = list(base.parameters())
    return Load(
        sites=sites,
        ranks=plan.built.rank_pattern() if isinstance(plan, RankPlan) else everywhere,
        weights=stored.whole if any(w.is_meta for w in weights) else sum(_held_bytes(w) for w in weights),
        dequantised=stored.dequantised,
        copies=_copies(plan, number_bytes) if isinstance(plan, RankPlan) else (),
        trained_parameters=sum(map(size, trained.values())),
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        number_bytes=number_bytes,
        longest=longest,
        whole_logits=not packed,
        spelled_activation=not fused and any(type(module).__name__ == "NewGELUActivation" for module in base.modules()),
    )


def _copies(plan: RankPlan, number_bytes: int) -> tuple[int, ...]:
    """Return the bytes of each block's stacks of experts that are adapted, and copied for it."""
    held: Counter[tuple[str, int]] = Counter()
    for site in (entry.site for entry in plan.entries if entry.site.experts):
        held[site.tower, site.layer] += site.experts * site.in_features * site.out_features * number_bytes
    return tuple(held.values())


def _held_bytes(weight: Any) -> int:
    """Return the bytes of a weight that this process holds."""
    return int((weight.to_local() if hasattr(weight, "to_local") else weight).nbytes)


def trained_shapes(base: Any, plan: Plan, head: Sequence[str] = ()) -> dict[str, Shape]:
    """Return name -> shape of every trained tensor: those of the plan, and the task's head.

    Args:
        base: transformers model; its weights may be on the meta device.
        plan: plan of the trained parameters.
        head: modules of the base that the task trains in addition to the plan.
    """
    shapes: dict[str, Shape] = {}
    if isinstance(plan, RankPlan):
        for entry in plan.built.entries:
            site = entry.site
            if not site.frozen_a:
                shapes[f"{site.name}.A"] = (entry.rank * site.matrices, site.in_features)
            shapes[f"{site.name}.B"] = (site.out_features, entry.rank * site.matrices)
            if entry.dora:
                shapes[f"{site.name}.magnitude"] = (entry.magnitudes,)
    else:
        shapes.update(plan.tensors)
    for module in head:
        for name, tensor in base.get_submodule(module).named_parameters(prefix=module):
            shapes.setdefault(name, tuple(tensor.shape))
    return shapes


def _block(site: AdapterSite) -> str:
    """Return the name of the block that holds a site: its module name up to its layer index."""
    parts = site.name.split(".")
    return ".".join(parts[: parts.index(str(site.layer)) + 1])


def _unit(name: str, blocks: Container[str]) -> str:
    """Return the block that holds a tensor, or an empty text."""
    ends = (place for place, character in enumerate(name) if character == ".")
    return next((name[:end] for end in ends if name[:end] in blocks), "")


def _embedding(base: Any, end: str) -> list[nn.Parameter]:
    """Return the weights of the `input` or `output` embeddings of a base; empty where it has none."""
    try:
        module = getattr(base, f"get_{end}_embeddings")()
    except (AttributeError, NotImplementedError):
        return []
    return [] if module is None else list(module.parameters())


def storage_of(base: Any, sites: Sequence[AdapterSite], *, packed: bool, number_bytes: int) -> Storage:
    """Return the sizes of a base's weights as they are stored, also for a model on the meta device.

    In 4 bit, where layers allow it: half a byte per weight, 8 bits per block for its scale, and a float32 for
    every 256 scales (QLoRA, 2305.14314, section 3). accelerate gathers each block, the embeddings and the head
    by themselves, and the rest of the model, which stays gathered, with its root.

    Args:
        base: the base, or its architecture on the meta device.
        sites: all sites of the base; the blocks that hold them are sharded one by one.
        packed: whether it is stored in 4 bit, where its layers allow it.
        number_bytes: bytes of a weight that is not packed.
    """
    in_4_bit = {f"{name}.weight" for name in packed_layers(base)} if packed else set()
    blocks = {_block(site) for site in sites}
    ends = {id(p): end for end in ("input", "output") for p in _embedding(base, end)}
    shards: Counter[tuple[int, int]] = Counter()
    units: Counter[str] = Counter()
    scales = dequantised = 0
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        shape = tuple(parameter.shape if state is None else state.shape) or (1,)
        row = size(shape) // shape[0] * number_bytes
        shard = (shape[0], row)
        if name in in_4_bit:
            count = math.ceil(size(shape) / _BLOCK)
            scales += count + 4 * math.ceil(count / _NESTED_BLOCK)
            dequantised = max(dequantised, shape[0] * row)
            shard = (math.ceil(size(shape) / 2), 1)
        shards[shard] += 1
        units[_unit(name, blocks) or ends.get(id(parameter), "")] += math.prod(shard)
    largest = max((units[block] for block in blocks), default=0)
    return Storage(
        shards=shards,
        scales=scales,
        gathered=units[""] + largest + max(largest, units["input"], units["output"]),
        dequantised=dequantised,
    )
