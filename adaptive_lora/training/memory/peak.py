"""Peak memory of a training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from adaptive_lora.models.malloc import release_freed_memory

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Peak memory of a training since this object was made.

    On a GPU: the allocator's own peak. On a CPU: the model, plus the rise of the process's resident
    memory above the start, after memory freed by earlier trainings has been returned; so neither the
    interpreter nor earlier trials count. Only Linux can reset the peak.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        """Start measuring, with a model that is on the device."""
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        tensors = [*model.parameters(), *model.buffers()]
        self._held = sum(tensor.nbytes for tensor in tensors)
        release_freed_memory()
        self._before = count_anew()

    @property
    def bytes(self) -> int | None:
        """The peak in bytes; None where the system does not report it."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if self._before is None:
            return None
        return self._held + max(0, _status("VmHWM") - self._before)


def count_anew() -> int | None:
    """Reset the process's peak memory; return the resident bytes, or None if it cannot be reset."""
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
