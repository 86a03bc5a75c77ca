"""Types of adapters that PEFT does not have, from other installed packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .safety import UnsafeFiles

GROUP = "adaptive_lora.peft_types"
"""Group of the entry points by which a package offers a type, under its name; the object has `config_class`, a
`PeftConfig`, and `tuner_class`, a `BaseTuner`."""


def offered(kind: str) -> EntryPoint | None:
    """Return the entry point of the first package that offers a type, or None."""
    return next(iter(entry_points(group=GROUP, name=kind)), None)


def register(kind: str) -> None:
    """Make PEFT know a type that another package offers; nothing is done for PEFT's own.

    Raises:
        UnsafeFiles: neither PEFT nor an installed package has it.
    """
    from peft import mapping

    if kind in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    entry = offered(kind)
    if entry is None:
        raise UnsafeFiles(
            f"PEFT has no type of adapter {kind}, and no installed package offers it; install the package that the "
            "adapter was trained with"
        )
    found, tables = entry.load(), dict[str, Any](vars(mapping))  # whose keys are texts, too
    tables["PEFT_TYPE_TO_CONFIG_MAPPING"][kind] = found.config_class
    tables["PEFT_TYPE_TO_TUNER_MAPPING"][kind] = found.tuner_class
    tables["PEFT_TYPE_TO_PREFIX_MAPPING"][kind] = found.tuner_class.prefix
