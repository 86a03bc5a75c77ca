"""Training tasks, from rows to inputs, loss and scores; one per module."""

from adaptive_lora.models.tasks.catalogue import TASKS, task_named
from adaptive_lora.models.tasks.causal import CausalTask
from adaptive_lora.models.tasks.task import Task

__all__ = ["TASKS", "CausalTask", "Task", "task_named"]
