"""Device and precision of a study, chosen by the machine's abilities and run through accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adaptive_lora.config.launched import process_count, processes_here, wants_sharding
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import ConfigError
from adaptive_lora.models.distributed import Processes
from adaptive_lora.models.malloc import give_freed_memory_back, keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Device, precision and accelerator of trials."""

    accelerator: Accelerator
    precision: Precision
    """Compute type, `auto` resolved."""
    processes: Processes = field(default_factory=Processes)
    """Processes that train each trial together; by default this one alone."""

    @property
    def device(self) -> torch.device:
        """The device of all trials, of this process."""
        device: torch.device = self.accelerator.device
        return torch.device("cpu") if device.type == "cpu" else device  # accelerate numbers the CPUs of processes

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Return model and optimiser prepared by accelerate for this precision, without a wrapper for DDP."""
        if self.processes.count == 1:
            model, optimizer = self.accelerator.prepare(model, optimizer)
            return model, optimizer
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared, self.accelerator.prepare_optimizer(optimizer)

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
    processes: Processes = field(default_factory=Processes)
    """This process alone."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: autocast is the user's choice."""
        return nullcontext()


def start_runtime(precision: str, *, cpu: bool = False, sparing: bool = False, together: bool = False) -> Runtime:
    """Start accelerate, with a precision that the device supports natively.

    Args:
        precision: fp32, bf16, fp16 or auto.
        cpu: whether to ignore GPUs.
        sparing: whether a CPU returns freed memory to the system at once, which takes time.
        together: whether the processes that were launched train each trial together.

    Raises:
        ConfigError: the device does not support the precision, or several processes were launched for work of one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if process_count() > 1 and not together:
        raise ConfigError(
            f"this runs in one process; {process_count()} were launched. Start it without accelerate launch: only the "
            "commands train and study run on several processes."
        )
    if process_count() > 1:
        _require_gpu_each()
        cpu = cpu or not torch.cuda.is_available()  # accelerate otherwise starts no process group
    AcceleratorState._reset_state(reset_partial_state=True)  # precision may differ between studies
    resolved = resolve_precision(precision, cpu=cpu)
    accelerator = Accelerator(mixed_precision=resolved.mixed_precision, cpu=cpu)
    processes = Processes(accelerator.num_processes, accelerator.process_index, sharded=wants_sharding())
    if processes.count != process_count():
        raise ConfigError(
            f"{process_count()} processes were launched, and accelerate joins {processes.count} on "
            f"{accelerator.device}. Required are GPUs that torch can use, or a CPU."
        )
    if accelerator.device.type == "cpu":
        (give_freed_memory_back if sparing else keep_freed_memory)()
    return Runtime(accelerator=accelerator, precision=resolved, processes=processes)


def _require_gpu_each() -> None:
    """Raise ConfigError if this machine has GPUs, but fewer than processes."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < (processes := processes_here()):
        raise ConfigError(
            f"{processes} processes were launched on a machine with {gpus} GPUs; each needs one of its own. Give "
            f"accelerate launch --num_processes {gpus}."
        )


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
