"""Loads a saved adapter onto its base with stock libraries and runs it.

A copy of this folder travels inside every MLflow model (`code_paths`), so that serving needs torch,
transformers and peft but not this package. It must therefore import nothing from `adaptive_lora`;
its own files import each other relatively.

An adapter folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`), or that of a custom
tuner (`custom_tuner.py`), plus `adaptive_lora.json`: the base's reference and content hash, dtype,
prompt template and task.
"""

from .answers import LISTS, content_of, open_image
from .audio import Recording, features_of, longest_seconds, open_recording, transcribe
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
    "Recording",
    "SavedQuantisation",
    "TaskSpec",
    "UnsafeFiles",
    "answer",
    "base_folder",
    "content_hash",
    "content_hashes",
    "content_of",
    "features_of",
    "generate",
    "generate_targets",
    "load_adapter",
    "load_and_compare",
    "load_model",
    "longest_seconds",
    "open_image",
    "open_processor",
    "open_recording",
    "packed_layers",
    "quantisation_in",
    "render",
    "saved_labels",
    "saved_quantisation",
    "transcribe",
    "virtual_tokens",
    "without_weights",
]
