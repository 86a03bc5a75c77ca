"""Number of GPUs that one trial of a plan needs, as a table, and the engine to choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptive_lora.runner.plan_table import PlanTable
from adaptive_lora.training.memory import GPU_SIZES, MOST_GPUS, GpuNeed

_BASES = {"bf16": "bf16", "nf4": "4 bit (base=nf4)"}
"""Storage of the base -> its name for a reader."""
_MACHINE = 8
"""Number of GPUs of a usual machine."""


def gpu_table(needs: Sequence[GpuNeed]) -> PlanTable:
    """Return the number of GPUs by storage of the base, sharding and size of a GPU.

    A row of its values holds one number: `base`, `fsdp`, `gpu_gib`, `gpus`, and of each of these GPUs
    `expected` and `high` bytes, `micro_batch` and `gradient_checkpointing`; None where a trial does not fit.
    """
    numbers = {(need.base, need.fsdp, need.gpu_gib): need.gpus for need in needs}
    kinds = dict.fromkeys((need.base, need.fsdp) for need in needs)
    cells = tuple(
        (
            f"{_BASES[base]}, {'FSDP2' if fsdp else 'whole base'}",
            *(str(numbers[base, fsdp, size] or "-") for size in GPU_SIZES),
        )
        for base, fsdp in kinds
    )
    return PlanTable(
        title="GPUs for one trial",
        values=tuple(map(_values, needs)),
        head=("base", *(f"{size} GB" for size in GPU_SIZES)),
        cells=cells,
    )


def _values(need: GpuNeed) -> dict[str, Any]:
    """Return a need as JSON-ready values."""
    choice = need.choice
    return {
        "base": need.base,
        "fsdp": need.fsdp,
        "gpu_gib": need.gpu_gib,
        "gpus": need.gpus,
        "expected": choice and choice.estimate.expected,
        "high": choice and choice.estimate.high,
        "micro_batch": choice and choice.micro_batch,
        "gradient_checkpointing": choice and choice.checkpointing,
    }


def engine_advice(needs: Sequence[GpuNeed]) -> list[str]:
    """Return the way to run a trial, one sentence for each storage of the base.

    In 4 bit is left out where the smallest GPU holds the base in bf16.
    """
    sentences = []
    for base, name in _BASES.items():
        mine = [need for need in needs if need.base == base and need.gpus is not None]
        alone = next((need for need in mine if need.gpus == 1), None)
        if alone is not None:
            sentences.append(
                f"{name} fits on one {alone.gpu_gib} GB GPU: one trial per GPU, by --devices all on one machine "
                "and --engine ray on several."
            )
            if alone.gpu_gib == GPU_SIZES[0]:
                break
        elif mine:
            shared = next((need for need in mine if (need.gpus or 0) <= _MACHINE), mine[-1])
            sentences.append(
                f"{name} fits on no single GPU of up to {GPU_SIZES[-1]} GB: share each trial by accelerate launch "
                f"--use_fsdp --fsdp_version 2 --num_processes {shared.gpus}, over {shared.gpus} GPUs of "
                f"{shared.gpu_gib} GB."
            )
        elif any(need.base == base for need in needs):
            sentences.append(
                f"{name} does not fit, even over {MOST_GPUS:,} GPUs of {GPU_SIZES[-1]} GB: one example with gradient "
                "checkpointing is too large; lower --max-tokens or take a smaller base."
            )
    return sentences
