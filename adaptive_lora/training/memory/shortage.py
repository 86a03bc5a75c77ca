"""What to do where a step does not fit in memory: the same step in smaller parts."""

from __future__ import annotations

import logging

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from adaptive_lora.errors import TrialFailed

RandomState = tuple[torch.Tensor, list[torch.Tensor]]
"""Of the CPU's generator and of each GPU's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is short, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
        or (isinstance(error, Exception) and should_reduce_batch_size(error))
    )


def halved(number: int, what: str) -> int:
    """Return half as many of what goes through the model at once; say so; free memory.

    Args:
        number: in the attempt that failed; above 1.
        what: is counted, for the message.
    """
    clear_device_cache(garbage_collection=True)
    logging.getLogger(__name__).warning(
        "out of memory with %d %s; going on with %d, and the same effective batch.", number, what, number // 2
    )
    return number // 2


def too_large(reason: str) -> TrialFailed:
    """Return the failure of a trial whose single examples do not fit; the error's words given."""
    return TrialFailed(
        f"out of memory with one example per forward pass ({(reason.splitlines() or [''])[0]}). "
        "Use gradient_checkpointing, lower max_tokens, or a smaller base or precision bf16."
    )


def random_state() -> RandomState:
    """Return the state of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


def set_random_state(state: RandomState) -> None:
    """Put torch's global generators where `random_state` found them."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
