"""Peak memory of a trial."""

from __future__ import annotations

import psutil
import torch


class PeakMemory:
    """Highest memory seen since it was made.

    On a GPU: the allocator's own peak. On a CPU: resident memory of the process, sampled at each
    step, so it includes the interpreter, the base and whatever earlier trials left behind.
    """

    def __init__(self, device: torch.device) -> None:
        """Start from here."""
        self._device, self._peak, self._process = device, 0, psutil.Process()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def sample(self) -> None:
        """Look now; called once a step, after the backward pass."""
        if self._device.type != "cuda":
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """The peak in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return self._peak
