"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaptive_lora.config import StudyConfig
from adaptive_lora.tasks.causal import CausalTask
from adaptive_lora.tasks.task import Task

TASKS: Mapping[str, type[Task]] = MappingProxyType({task.name: task for task in (CausalTask,)})
"""Value of the option `task` -> task."""


def task_named(config: StudyConfig) -> type[Task]:
    """Return the task of a study."""
    return TASKS["causal" if config.data.task == "auto" else config.data.task]
