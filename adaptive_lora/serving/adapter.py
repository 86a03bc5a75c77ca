"""A saved adapter on its base, and its answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import BASE_VARIABLE, TRUST_VARIABLE, BaseMismatch, base_folder, content_hashes
from .gguf_file import require_gguf
from .safety import RECORD, UnsafeFiles, read_record, require_adapter, require_base, require_loaded
from .task_models import CAUSAL, load_model, open_processor
from .tasks import TASKS

__all__ = ["RECORD", "load_adapter"]


def load_adapter(
    folder: Path, *, dequantise: bool = False, trust_remote_code: bool | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Return (adapted model in evaluation mode, processor, record) of an adapter folder.

    Args:
        folder: folder of the adapter.
        dequantise: whether a quantised base is loaded with dequantised weights.
        trust_remote_code: whether to run the base's own Python code; None: by environment variable.

    Raises:
        BaseMismatch: the base's content hash is not the recorded one.
        UnsafeFiles: files could run code, are corrupt, or contradict each other.
    """
    import torch

    record = read_record(folder)
    task = record.setdefault("task", dict(CAUSAL))
    if task["name"] not in TASKS:
        raise UnsafeFiles(f"{folder / RECORD}: required one of the tasks {', '.join(TASKS)}")
    require_adapter(folder)
    if trust_remote_code is None:
        trust_remote_code = os.environ.get(TRUST_VARIABLE) == "1"
    where, trust = _recorded_base(record["base"], trust_remote_code)
    dtype, quantisation = getattr(torch, record["dtype"]), record.get("quantisation")
    model = load_model(where, dtype, task, quantisation, dequantise=dequantise, trust_remote_code=trust)
    model = _adapted(model, folder).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, open_processor(where, task, trust_remote_code=trust), record


def _recorded_base(base: Mapping[str, Any], allowed: bool) -> tuple[Path, bool]:
    """Return the path of a record's base, checked, and whether its code is run."""
    trust = bool(base.get("trust_remote_code"))
    if trust and not allowed:
        raise UnsafeFiles(
            f"base {base['name']} runs its own Python code, which is not done unless you say so: "
            f"--trust-remote-code true, or {TRUST_VARIABLE}=1 where the adapter is served."
        )
    where = base_folder(base["source"], base["name"], base["revision"], code=trust)
    if where.is_file():
        require_gguf(where)
    else:
        require_base(where, weights=True, trust_remote_code=trust)
    found = content_hashes(where, code=trust)
    if base["content_hash"] not in found:
        raise BaseMismatch(
            f"base at {where} has content hash {found[0][:12]}, the adapter was trained on "
            f"{base['content_hash'][:12]}; use the same base or set {BASE_VARIABLE}."
        )
    return where, trust


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    from .custom_tuner import FAMILY, load_custom_tuner

    if (folder / FAMILY).is_file():
        return load_custom_tuner(model, folder)
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; not caused by this package.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # The configuration of a quantised GPT-2's adapter says Linear; PEFT corrects it to Conv1D.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # Missing tensors are an error below.
        warnings.filterwarnings("ignore", ".*missing adapter keys", UserWarning)
        model = PeftModel.from_pretrained(model, str(folder))
    require_loaded(model, folder)
    return model
