"""Tasks: what a base is trained to do, from rows to inputs, loss and scores. One a file."""

from adaptive_lora.tasks.catalogue import TASKS, task_named
from adaptive_lora.tasks.causal import CausalTask
from adaptive_lora.tasks.task import Task

__all__ = ["TASKS", "CausalTask", "Task", "task_named"]
