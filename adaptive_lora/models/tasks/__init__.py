"""Tasks: what a base is trained to do, from rows to inputs, loss and scores. One a file."""

from adaptive_lora.models.tasks.catalogue import TASKS, task_named
from adaptive_lora.models.tasks.causal import CausalTask
from adaptive_lora.models.tasks.task import Task

__all__ = ["TASKS", "CausalTask", "Task", "task_named"]
