"""Number of GPUs that one trial needs, with the whole base on each of them or sharded by FSDP2.

    a GPU's memory = weights + adapters + activations + head + work        (as in `estimate.py`)

    whole base     all weights
    FSDP2          1 / N of each weight, by rows, + 4-bit scales + the gathered weights
    both           all adapters, gradients and moments: FSDP2 divides the frozen base alone

- FSDP2 shards every tensor by its rows, the last GPU's rows filled up. bitsandbytes keeps the scales of
  4-bit weights beside the weight, where FSDP2 does not see them: they stay whole on every GPU.
- *gathered*: a block while it computes, and beside it the next one, or embeddings or head; what is in none
  of these stays gathered.
- A batch is divided over the GPUs, so activations are those of the batch's share, of one example at least.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from adaptive_lora.config import TrainConfig
from adaptive_lora.training.memory.estimate import Load, MemoryChoice, fit

GPU_SIZES = (16, 24, 40, 48, 80, 96, 141)
"""Sizes of common GPUs, in GiB as their makers round them."""
USABLE = 0.9
"""Share of a GPU's size that a training can use: the rest is error correction, context and communication."""
MOST_GPUS = 1024
"""Number of GPUs above which a base counts as too large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Sizes of a base's weights as they are stored, for FSDP2."""

    shards: Mapping[tuple[int, int], int]
    """(rows, bytes of a row) -> number of frozen weights of that shape."""
    scales: int
    """Bytes of the scales of weights in 4 bit."""
    gathered: int
    """Bytes of the weights that a GPU holds whole at one time."""
    dequantised: int
    """Bytes of the largest layer in 4 bit, dequantised; 0 without one."""

    @property
    def whole(self) -> int:
        """Bytes of all weights."""
        return _share(self.shards, 1) + self.scales

    def weights(self, gpus: int) -> int:
        """Return the bytes of the base that one of several GPUs holds."""
        return _share(self.shards, gpus) + self.scales + self.gathered


def _share(shapes: Mapping[tuple[int, int], int], gpus: int) -> int:
    """Return the bytes of the first of several shards of tensors, by rows."""
    return sum(number * math.ceil(rows / gpus) * row for (rows, row), number in shapes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuNeed:
    """Number of GPUs of one size for one trial."""

    base: str
    """Storage of the base: `bf16` or `nf4`."""
    fsdp: bool
    """Mark of a base sharded by FSDP2; otherwise each GPU holds the whole base."""
    gpu_gib: int
    """Size of a GPU in GiB."""
    gpus: int | None
    """Smallest number of GPUs; None: a trial does not fit."""
    choice: MemoryChoice | None
    """Settings and memory of each GPU; None where a trial does not fit."""


def gpu_needs(load: Load, storages: Mapping[str, Storage], config: TrainConfig) -> tuple[GpuNeed, ...]:
    """Return the number of GPUs of each common size that a trial needs, whole and sharded.

    Args:
        load: sizes of the training; weights are those of `storages`.
        storages: `bf16`, `nf4` -> sizes of the base stored so.
        config: batch size, and checkpointing, which is kept if the user set it.
    """
    return tuple(
        GpuNeed(base=base, fsdp=fsdp, gpu_gib=size, gpus=found and found[0], choice=found and found[1])
        for base, storage in storages.items()
        for fsdp in (False, True)
        for size in GPU_SIZES
        for found in [_fewest(load, storage, config, USABLE * size * 2**30, fsdp)]
    )


def _fewest(
    load: Load, storage: Storage, config: TrainConfig, limit: float, fsdp: bool
) -> tuple[int, MemoryChoice] | None:
    """Return the smallest number of GPUs that a trial fits on, with its settings; None: there is none.

    Args:
        load: sizes of the training.
        storage: sizes of the base.
        config: batch size and checkpointing.
        limit: usable bytes of a GPU.
        fsdp: whether more than one GPU may share the base.
    """

    def choice(gpus: int) -> MemoryChoice | None:
        share = replace(
            load, weights=storage.whole if gpus == 1 else storage.weights(gpus), dequantised=storage.dequantised
        )
        examples = math.ceil(config.batch_size / gpus)
        return fit(share, examples, limit=limit, checkpointing=config.gradient_checkpointing)

    several = range(2, MOST_GPUS + 1) if fsdp else range(0)
    if choice(1) is not None:
        gpus = 1
    elif several and choice(several[-1]) is not None:
        gpus = several[bisect_left(several, True, key=lambda number: choice(number) is not None)]
    else:
        return None
    chosen = choice(gpus)
    assert chosen is not None
    return gpus, chosen
