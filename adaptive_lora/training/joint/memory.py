"""Number of trials per joint pass, by the available memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from adaptive_lora.config import shown
from adaptive_lora.training.memory import Estimate
from adaptive_lora.training.memory.estimate import SPREAD


def passes_at_once(estimates: Sequence[Estimate | None], *, limit: int | None, device: torch.device) -> int:
    """Return the number of trials whose batches fit into one forward pass, for any choice of trials.

    The base's weights count once, everything else once per trial. Without an estimate, and on a CPU
    without a limit, all trials are tried at once, and halved if memory is short.

    Args:
        estimates: memory of each trial's whole batch in one forward pass.
        limit: bytes that training may use, including weights; None: a GPU's free memory.
        device: training device.
    """
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return len(estimates)
    if limit is not None:
        room = limit - SPREAD * known[0].weights
    elif device.type == "cuda":
        room = free_bytes(device)  # the weights are already loaded
    else:
        return len(estimates)
    most = 0
    for estimate in sorted(known, key=lambda each: -each.share):
        room -= SPREAD * estimate.share
        most += room >= 0
    if most < len(estimates):
        logging.getLogger(__name__).warning(
            "%d of %d trials are trained at once: a batch takes up to %s in addition to the base",
            max(1, most),
            len(estimates),
            shown(int(SPREAD * max(each.share for each in known))),
        )
    return max(1, most)  # a single trial divides its batch


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, including those that torch has cached."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept
