"""What fits into a limit: how many examples per forward pass, and whether to recompute."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive_lora.errors import ConfigError
from adaptive_lora.memory.estimate import Estimate, Load, estimate
from adaptive_lora.memory.size import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryChoice:
    """How a training keeps within a limit."""

    micro_batch: int
    """Examples per forward pass."""
    checkpointing: bool
    estimate: Estimate


def choose(load: Load, *, batch_size: int, limit: int, checkpointing: bool) -> MemoryChoice:
    """Return the largest micro-batch whose upper estimate is within a limit.

    A smaller micro-batch costs nothing but launches; forming activations again costs a forward
    pass, a third of the time. So checkpointing is chosen only where not even one example fits
    without it.

    Args:
        load: what is trained.
        batch_size: most examples per forward pass.
        limit: bytes.
        checkpointing: was asked for, and is not taken back.

    Raises:
        ConfigError: one example does not fit with checkpointing either.
    """
    for recompute in (True,) if checkpointing else (False, True):
        size = batch_size
        while size >= 1:
            found = estimate(load, examples=size, checkpointing=recompute)
            if found.high <= limit:
                return MemoryChoice(micro_batch=size, checkpointing=recompute, estimate=found)
            size //= 2
    least = estimate(load, examples=1, checkpointing=True)
    raise ConfigError(
        f"max_memory {shown(limit)} is too little: one example of {load.longest} tokens with "
        f"gradient checkpointing takes up to {shown(least.high)}, of which {shown(least.weights)} "
        "are the base's weights. Raise it, lower max_tokens, or use bf16 or a smaller base."
    )


def describe(choice: MemoryChoice, batch_size: int) -> str:
    """Return one sentence on what was chosen."""
    parts = (
        "the whole batch in one forward pass"
        if choice.micro_batch >= batch_size
        else f"{choice.micro_batch} of {batch_size} examples per forward pass"
    )
    how = "with" if choice.checkpointing else "without"
    return (
        f"{parts}, {how} gradient checkpointing: {shown(choice.estimate.expected)} expected, "
        f"{shown(choice.estimate.high)} at most"
    )
