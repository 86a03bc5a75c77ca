"""Loads a saved adapter onto its base with stock libraries and runs it.

A copy of this folder travels inside every MLflow model (`code_paths`), so that serving needs torch,
transformers and peft but not this package. It must therefore import nothing from `adaptive_lora`;
its own files import each other relatively.

An adapter folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`), or that of a custom
tuner (`custom_tuner.py`), plus `adaptive_lora.json`: the base's reference and content hash, dtype,
prompt template and task.
"""

from .answers import LISTS, open_image
from .base import BASE_VARIABLE, HUB_FILES, TRUST_VARIABLE, BaseMismatch, base_folder, content_hash, content_hashes
from .quantised import NF4, SavedQuantisation, packed_layers, quantisation_in, saved_quantisation
from .safety import RECORD, UnsafeFiles
from .task_models import (
    CAUSAL,
    Differences,
    load_adapter,
    load_and_compare,
    load_model,
    open_processor,
    saved_labels,
    without_weights,
)
from .tasks import TASKS, TaskSpec, answer
from .text import generate, generate_targets, render, virtual_tokens

__all__ = [
    "BASE_VARIABLE",
    "CAUSAL",
    "HUB_FILES",
    "LISTS",
    "NF4",
    "RECORD",
    "TASKS",
    "TRUST_VARIABLE",
    "BaseMismatch",
    "Differences",
    "SavedQuantisation",
    "TaskSpec",
    "UnsafeFiles",
    "answer",
    "base_folder",
    "content_hash",
    "content_hashes",
    "generate",
    "generate_targets",
    "load_adapter",
    "load_and_compare",
    "load_model",
    "open_image",
    "open_processor",
    "packed_layers",
    "quantisation_in",
    "render",
    "saved_labels",
    "saved_quantisation",
    "virtual_tokens",
    "without_weights",
]
