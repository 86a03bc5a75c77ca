"""Handling of memory shortage: the same step in smaller micro-batches."""

from __future__ import annotations

import logging

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from adaptive_lora.errors import TrialFailed


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
        or (isinstance(error, Exception) and should_reduce_batch_size(error))
    )


def halved(number: int, what: str) -> int:
    """Return half the number of items per forward pass, with a warning; free memory.

    Args:
        number: number in the failed attempt, above 1.
        what: noun for the items, for the message.
    """
    clear_device_cache(garbage_collection=True)
    logging.getLogger(__name__).warning(
        "out of memory with %d %s; continuing with %d, and the same effective batch.", number, what, number // 2
    )
    return number // 2


def too_large(reason: str) -> TrialFailed:
    """Return the failure of a trial whose single examples do not fit, with the error's message."""
    return TrialFailed(
        f"out of memory with one example per forward pass ({(reason.splitlines() or [''])[0]}). "
        "Use gradient_checkpointing, lower max_tokens, or a smaller base or precision bf16."
    )
