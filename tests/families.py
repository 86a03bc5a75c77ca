"""Tasks that each row of the tables is trained for, and the table of families in the docs.

`python tests/families.py` prints that table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import transformers
from architectures import ARCHITECTURES, LEFT_OUT

from adaptive_lora.models.classes import auto_class
from adaptive_lora.serving import TASKS

SITES_ALONE: Mapping[str, str] = {
    "dinov3": "transformers has no classification head for it",
    "llava-onevision": "its processor makes several rows of an image",
}
"""Row whose sites are tested, and which no task trains -> the reason."""
PART: Mapping[str, str] = {"phi4-multimodal": ",towers=main", "gemma3-vl": ",towers=language", "qwen3.5-vl": ""}
"""Row of a model that sees and is trained on text too -> the option that leaves out what text does not reach."""
KIN = {
    "arcee", "camembert", "codegen", "cohere", "electra", "ernie", "ernie4.5", "exaone4", "glm", "gptj", "helium",
    "hunyuan", "m2m-100", "marian", "mbart", "ministral", "ministral3", "nemotron", "olmo", "olmo3", "pegasus",
    "seed-oss", "stablelm", "starcoder2", "umt5", "xlm-roberta",
}  # fmt: skip
"""Rows whose blocks are like those of another row: trained in the long tests."""


def trained(names: Iterable[str]) -> list[Any]:
    """Return rows as parameters of a test, with the long tests marked."""
    return [pytest.param(name, marks=pytest.mark.long) if name in KIN else name for name in names]


def task_of(name: str) -> str:
    """Return the task that a row is trained for."""
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    found = auto_class(config).__name__
    known = {task.auto_class: task.name for task in TASKS.values() if task.saved_as == task.auto_class}
    known["AutoModelForMaskedLM"] = "classification"
    if found == "AutoModel":
        return "image_text" if hasattr(config, "text_config") else "image_classification"
    return known[found]


def table() -> str:
    """Return the table of the families as Markdown."""
    rows: dict[str, set[str]] = {}
    for name, (kind, _, _) in ARCHITECTURES.items():
        task = "its sites are tested; no task trains it" if name in SITES_ALONE else f"`{task_of(name)}`"
        mark = "*" if name in LEFT_OUT else ""
        rows.setdefault(task, set()).add(f"`{getattr(transformers, kind).model_type}`{mark}")
    lines = ["| trained in the tests as | `model_type` |", "|---|---|"]
    for task, kinds in rows.items():
        lines.append(f"| {task} | {', '.join(sorted(kinds, key=lambda kind: kind.strip('`*')))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
