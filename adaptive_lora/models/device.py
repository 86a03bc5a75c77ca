"""Device and precision of a study, chosen by the machine's abilities and run through accelerate."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adaptive_lora.config.types import Precision
from adaptive_lora.errors import ConfigError
from adaptive_lora.models.malloc import give_freed_memory_back, keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Device, precision and accelerator of trials."""

    accelerator: Accelerator
    precision: Precision
    """Compute type, `auto` resolved."""

    @property
    def device(self) -> torch.device:
        """The device of all trials."""
        device: torch.device = self.accelerator.device
        return device

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes in mixed precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    @property
    def base_dtype(self) -> torch.dtype:
        """Type of the frozen base's weights; adapters stay float32."""
        dtype: torch.dtype = getattr(torch, self.precision.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class OwnRuntime:
    """Runtime of a model that stays as it is: on its device, in its precision."""

    device: torch.device
    """Device of the model."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: autocast is the user's choice."""
        return nullcontext()


def start_runtime(precision: str, *, cpu: bool = False, sparing: bool = False) -> Runtime:
    """Start accelerate for one process, with a precision that the device supports natively.

    Args:
        precision: fp32, bf16, fp16 or auto.
        cpu: whether to ignore GPUs.
        sparing: whether a CPU returns freed memory to the system at once, which takes time.

    Raises:
        ConfigError: the device does not support the precision, or several processes were launched.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # precision may differ between studies
    resolved = resolve_precision(precision, cpu=cpu)
    accelerator = Accelerator(mixed_precision=resolved.mixed_precision, cpu=cpu)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"a trial runs in one process; accelerate started {accelerator.num_processes}. Launch "
            "without `accelerate launch --num_processes`."
        )
    if accelerator.device.type == "cpu":
        (give_freed_memory_back if sparing else keep_freed_memory)()
    return Runtime(accelerator=accelerator, precision=resolved)


def resolve_precision(precision: str, *, cpu: bool = False) -> Precision:
    """Return the precision of `auto` on this device, or check that the given one works on it.

    A CPU counts as native only with AMX tiles: with AVX-512 BF16 alone, bf16 matrix products ran 10
    to 400 times slower than fp32 (by size and operation).

    Raises:
        ConfigError: fp16 on a CPU, where it has no gradient scaler and produces NaN.
    """
    cuda = torch.cuda.is_available() and not cpu
    if precision == "auto":
        if cuda:
            return Precision.BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.FP16
        return Precision.BF16 if torch.cpu.get_capabilities().get("amx_bf16") else Precision.FP32
    if precision == Precision.FP16 and not cuda:
        raise ConfigError("precision fp16 needs a GPU; use auto, fp32 or bf16 on a CPU.")
    return Precision(precision)


@contextmanager
def modules_uncollected() -> Iterator[None]:
    """Keep what is in memory out of garbage collections for the block.

    Memory is freed after every trial, and a collection that goes through all imported modules takes half a second.
    """
    if gc.get_freeze_count():  # the program's own, which `unfreeze` would end
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
