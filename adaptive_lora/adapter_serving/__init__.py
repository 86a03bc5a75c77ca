"""Loads a saved adapter onto its base with stock libraries and generates text.

A copy of this folder travels inside every MLflow model (`code_paths`), so that serving needs torch,
transformers and peft but not this package. It must therefore import nothing from `adaptive_lora`,
and its own files by relative names.

An adapter folder is PEFT's (`adapter_config.json`, `adapter_model.safetensors`) plus
`adaptive_lora.json`: the base's reference and content hash, dtype and prompt template.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_VARIABLE = "ADAPTIVE_LORA_BASE"
"""Environment variable: folder to use as the base instead of the recorded reference."""
RECORD = "adaptive_lora.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_FILES = (*_OTHERS, "*.safetensors")


class BaseMismatch(RuntimeError):
    """The base on this machine is not the one that the adapter was trained on."""


def content_hash(folder: Path) -> str:
    """Return SHA-256 over configuration, tokenizer and weights of a model folder.

    Names and contents enter, times and other files do not; two copies have the same hash.
    """
    total = hashlib.sha256()
    names = {
        path
        for pattern in (*_WEIGHTS, "config.json", "tokenizer*", "vocab*", "merges.txt")
        for path in folder.glob(pattern)
        if path.is_file()
    }
    for path in sorted(names):
        with path.open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{inner}\n".encode())
    return total.hexdigest()


def base_folder(source: str, name: str, revision: str | None = None) -> Path:
    """Return the folder of a base model, fetching a hub model on first use.

    Args:
        source: `embedded` (inside the adaptive_lora package), `folder` or `hub`.
        name: path of a folder or id on the hub.
        revision: hub revision.

    Raises:
        FileNotFoundError: the folder or package is not there.
    """
    override = os.environ.get(BASE_VARIABLE)
    if override:
        return Path(override)
    if source == "embedded":
        spec = importlib.util.find_spec("adaptive_lora")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the embedded base comes with the package adaptive_lora, which is not installed; "
                f"install it or set {BASE_VARIABLE} to a copy of its embedded/base folder."
            )
        return Path(spec.submodule_search_locations[0]) / "embedded" / "base"
    if source == "folder":
        if not Path(name).is_dir():
            raise FileNotFoundError(f"base folder {name} not found; set {BASE_VARIABLE} to a copy.")
        return Path(name)
    return _hub_folder(name, revision)


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    if not any(folder.glob("*.safetensors")):
        # Older repositories hold pickled weights only; transformers reads them with weights_only.
        patterns = [*HUB_FILES, "pytorch_model*.bin"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    return folder


def render(template: Mapping[str, str], prompt: str, context: str = "") -> str:
    """Fill a prompt template; braces inside the data stay as they are."""
    text = template["with_input"] if context else template["without_input"]
    values = {"prompt": prompt, "input": context}
    return re.sub(r"\{(prompt|input)\}", lambda match: values[match.group(1)], text)


def load_adapter(folder: Path) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Any]]:
    """Return (PEFT model in evaluation mode, tokenizer, record) of an adapter folder.

    Raises:
        BaseMismatch: the base's content hash is not the recorded one.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    base = record["base"]
    where = base_folder(base["source"], base["name"], base["revision"])
    found = content_hash(where)
    if found != base["content_hash"]:
        raise BaseMismatch(
            f"base at {where} has content hash {found[:12]}, the adapter was trained on "
            f"{base['content_hash'][:12]}; use the same base or set {BASE_VARIABLE}."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, record["dtype"]))
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renames; nothing of ours.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, AutoTokenizer.from_pretrained(where), record


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Continue prompts greedily, shortest first in batches, and return texts in the given order.

    Args:
        model: causal language model, with or without adapter.
        tokenizer: of the same model.
        prompts: token ids per prompt.
        max_new_tokens: most tokens generated per prompt.
        batch_size: prompts per call of the model.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # End-of-text fills finished rows: with a pad token, transformers warns of padding in its loop.
    pad = int(tokenizer.eos_token_id)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[index] for index in chosen], pad, model.device)
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=pad,
            )
        for index, row in zip(chosen, output[:, ids.shape[1] :], strict=True):
            texts[index] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts


def _left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


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
