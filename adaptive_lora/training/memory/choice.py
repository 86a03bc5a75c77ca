"""Choice of examples per forward pass and of gradient checkpointing under a memory limit."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive_lora.config import TrainConfig, shown
from adaptive_lora.errors import ConfigError
from adaptive_lora.training.memory.estimate import Estimate, Load, estimate


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

    A smaller micro-batch costs only kernel launches; recomputing activations costs a forward pass, a
    third of the time. So checkpointing is chosen only if not even one example fits without it.

    Args:
        load: sizes that determine the memory.
        config: batch size, limit, and checkpointing, which is kept if the user set it.

    Raises:
        ConfigError: not even one example fits with checkpointing.
    """
    whole = estimate(load, examples=config.batch_size, checkpointing=False)
    limit, asked = config.max_memory, config.gradient_checkpointing
    for recompute in (True,) if asked else (False, True):
        size = config.batch_size
        while size >= 1:
            found = estimate(load, examples=size, checkpointing=recompute)
            if limit is None or found.high <= limit:
                return MemoryChoice(micro_batch=size, checkpointing=recompute, estimate=found, whole=whole)
            size //= 2
    least = estimate(load, examples=1, checkpointing=True)
    raise ConfigError(
        f"max_memory {shown(limit or 0)} is too little: one example of {load.longest} tokens with "
        f"gradient checkpointing takes up to {shown(least.high)}, of which {shown(least.weights)} "
        "are the base's weights. Raise it, lower max_tokens, or use bf16 or a smaller base."
    )


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
