"""Processes that `accelerate launch` or torchrun started for one command, read from their environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from adaptive_lora.allocation.start import Start
from adaptive_lora.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_lora.config.study import StudyConfig

_OTHER_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Variable of `accelerate launch` -> engine that it asks for."""


def process_count() -> int:
    """Return the number of processes that run this command together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def processes_here() -> int:
    """Return the number of them on this machine."""
    return _number("LOCAL_WORLD_SIZE", process_count())


def process_index() -> int:
    """Return the index of this process; the first one, 0, records and prints."""
    return _number("RANK", 0) if process_count() > 1 else 0


def first_on_machine() -> bool:
    """Return whether this is the first process of its machine, which says what all of them would say."""
    return process_count() == 1 or _number("LOCAL_RANK", 0) == 0


def wants_sharding() -> bool:
    """Return whether the launcher asks for FSDP: each process then holds a part of the base."""
    return process_count() > 1 and _is_set("ACCELERATE_USE_FSDP")


def require_launch(config: StudyConfig) -> None:
    """Check the launcher's choices, and that no other engine distributes the trials too.

    Raises:
        ConfigError: they do not go together; the message has what to do.
    """
    if process_count() == 1:
        return
    for variable, engine in _OTHER_ENGINES.items():
        if _is_set(variable):
            raise ConfigError(
                f"a trial over several processes runs under DDP or FSDP2; the launcher asks for {engine}. "
                "Give accelerate launch --multi_gpu, or --use_fsdp --fsdp_version 2."
            )
    if wants_sharding() and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError(
            f"FSDP 2 is required; the launcher asks for version {os.environ.get('FSDP_VERSION', '1')}. Give "
            "accelerate launch --use_fsdp --fsdp_version 2."
        )
    whole = [
        spec.label
        for spec in config.specs
        if spec.dora or spec.alora or spec.experts or spec.init != Start.DEFAULT or not spec.options.divided_base
    ]
    if wants_sharding() and whole:
        raise ConfigError(
            f"{', '.join(whole)}: reads or trains weights of the base itself, as PEFT's types of adapters may, and "
            "FSDP2 divides these over processes. Leave it out, or launch without --use_fsdp, so "
            "that every process holds the base (DDP)."
        )
    given = {
        f"--engine {config.engine}": config.engine not in ("auto", "serial"),
        f"--workers {config.worker.workers}": config.worker.workers is not None,
        f"--devices {config.worker.devices}": config.worker.devices != "one",
    }
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{process_count()} processes were launched to run each trial together, and {' '.join(wrong)} runs trials "
            "beside each other: leave it out, or start the command without accelerate launch."
        )


def require_one_process(command: str) -> None:
    """Raise ConfigError if a command that needs one process was launched in several."""
    if process_count() > 1:
        raise ConfigError(
            f"{command} runs in one process; {process_count()} were launched. Start it without accelerate launch: only "
            "train and study run on several processes."
        )


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
