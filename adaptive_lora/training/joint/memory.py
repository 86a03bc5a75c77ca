"""How many trials go through the base at once, by the memory that there is."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from adaptive_lora.config import shown
from adaptive_lora.training.memory import Estimate
from adaptive_lora.training.memory.estimate import SPREAD


def passes_at_once(estimates: Sequence[Estimate | None], *, limit: int | None, device: torch.device) -> int:
    """Return how many trials' batches fit into one forward pass, whichever trials they are.

    Weights of the base count once, everything else once a trial. Without an estimate, and on a CPU
    without a limit, all are tried: what is out of memory then is halved.

    Args:
        estimates: of each trial's whole batch in one forward pass.
        limit: bytes that training may take, weights included; None: a GPU's free memory.
        device: that they train on.
    """
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return len(estimates)
    if limit is not None:
        room = limit - SPREAD * known[0].weights
    elif device.type == "cuda":
        room = free_bytes(device)  # the weights stand there already
    else:
        return len(estimates)
    most = 0
    for estimate in sorted(known, key=lambda each: -each.share):
        room -= SPREAD * estimate.share
        most += room >= 0
    if most < len(estimates):
        logging.getLogger(__name__).warning(
            "%d of %d trials go through the base at once: a batch takes up to %s beside the base",
            max(1, most),
            len(estimates),
            shown(int(SPREAD * max(each.share for each in known))),
        )
    return max(1, most)  # one by itself divides its batch


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that can be taken, those that torch keeps at hand included."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept
