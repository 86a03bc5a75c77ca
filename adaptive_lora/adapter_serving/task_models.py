"""How the base of a task is loaded: in training and in serving, by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AUTO_CLASSES: Mapping[str, str] = MappingProxyType({"causal": "AutoModelForCausalLM"})
"""Task -> transformers' class that loads its models."""
CAUSAL: Mapping[str, Any] = MappingProxyType({"name": "causal"})
"""The task of adapters that record none."""


def load_model(
    folder: Path, dtype: torch.dtype, task: Mapping[str, Any], *, trust_remote_code: bool = False
) -> Any:
    """Return the frozen model of a task in evaluation mode, on the CPU.

    Args:
        folder: of the base.
        dtype: of its weights.
        task: what the adapter records of its task: `name`, and what else that task needs.
        trust_remote_code: run Python code that lies beside the weights.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = getattr(transformers, AUTO_CLASSES[task["name"]])
    model = kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    model.requires_grad_(False)
    return model.eval()


def open_processor(
    folder: Path, task: Mapping[str, Any], *, trust_remote_code: bool = False
) -> Any:
    """Return what turns a task's texts and images into inputs: here, a tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
