"""A saved adapter on its base, and its answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .base import BASE_VARIABLE, BaseMismatch, base_folder, content_hash
from .task_models import CAUSAL, load_model, open_processor
from .text import generate, render

RECORD = "adaptive_lora.json"


def load_adapter(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return (adapted model in evaluation mode, processor, record) of an adapter folder.

    Raises:
        BaseMismatch: the base's content hash is not the recorded one.
    """
    import torch

    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    base = record["base"]
    where = base_folder(base["source"], base["name"], base["revision"])
    found = content_hash(where)
    if found != base["content_hash"]:
        raise BaseMismatch(
            f"base at {where} has content hash {found[:12]}, the adapter was trained on "
            f"{base['content_hash'][:12]}; use the same base or set {BASE_VARIABLE}."
        )
    task = record.setdefault("task", dict(CAUSAL))
    model = _adapted(load_model(where, getattr(torch, record["dtype"]), task), folder).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, open_processor(where, task), record


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    from .own_family import FAMILY, load_own_family

    if (folder / FAMILY).is_file():
        return load_own_family(model, folder)
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; nothing of ours.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder))


def answer(
    folder_model: tuple[Any, Any, Mapping[str, Any]],
    rows: Iterable[Mapping[str, Any]],
    max_new_tokens: int,
) -> list[str]:
    """Generate for rows of {prompt} (verbatim) or {instruction, input} (through the template).

    Raises:
        ValueError: a row has neither column.
    """
    model, tokenizer, record = folder_model
    prompts = []
    for row in rows:
        if row.get("prompt"):
            text = str(row["prompt"])
        elif row.get("instruction"):
            text = render(record["template"], str(row["instruction"]), str(row.get("input") or ""))
        else:
            raise ValueError(f"required a column 'prompt' or 'instruction', got {sorted(row)}")
        prompts.append(tokenizer(text)["input_ids"])
    return generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
