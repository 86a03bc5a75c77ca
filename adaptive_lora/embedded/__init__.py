"""The offline default: a small base model and task data that the package makes itself."""

from __future__ import annotations

from pathlib import Path

from adaptive_lora.embedded.build import build_base
from adaptive_lora.embedded.tasks import task_examples

__all__ = ["base_folder", "build_base", "task_examples"]


def base_folder() -> Path:
    """Return the folder of the shipped base: weights, config, tokenizer and its records."""
    return Path(__file__).parent / "base"
