"""A small study of every task: its base with random weights, its rows and its settings."""

from __future__ import annotations

import json
import random
from pathlib import Path

from conftest import rows
from hearing import save_hearing_base, save_recordings
from task_bases import (
    ENCODERS,
    SEEING,
    WORDS,
    labelled_rows,
    save_base,
    save_pictures,
    save_seeing_base,
    tagged_rows,
    write_rows,
)

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes decodes rightly from a width of 64 on a CPU."""
GPT2 = {
    "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 258,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
T5 = {
    "d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 258,
    "pad_token_id": 257, "eos_token_id": 256, "decoder_start_token_id": 257,
}  # fmt: skip
TASKS = (
    "causal", "classification", "regression", "token_classification", "seq2seq", "image_classification", "image_text",
    "vision_language", "speech_to_text",
)  # fmt: skip


def study_of(task: str, folder: Path) -> dict[str, object]:
    """Write base and rows of a task into a folder; return the options of a study of it.

    Ten steps, so that methods that change ranks in training have time to.
    """
    return {
        "task": task,
        "model": str(_base(task, folder / "base")),
        "data": str(_data(task, folder)),
        "template": "compact",
        "max_tokens": 120,
        "seeds": "0",
        "lr": "1e-2",
        "max_steps": 10,
        "batch_size": 4,
        "validations": 1,
        "profile_batches": 2,
        "profile_batch_size": 4,
        "generate": "off",
        "precision": "fp32",
    }


def _base(task: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    if task == "causal":
        return save_base(folder, "GPT2Config", GPT2, "GPT2LMHeadModel")
    if task in ("classification", "regression", "token_classification"):
        kind, settings, head = ENCODERS["bert"]
        return save_base(folder, kind, {**settings, **WIDE}, head)
    if task == "seq2seq":
        return save_base(folder, "T5Config", T5, "T5ForConditionalGeneration")
    if task == "speech_to_text":
        return save_hearing_base(folder)
    name = {"image_classification": "vit", "image_text": "clip", "vision_language": "llava"}[task]
    kind, settings, head = SEEING[name]
    wide = {
        key: {**value, **WIDE} if key in ("text_config", "vision_config") else value for key, value in settings.items()
    }
    return save_seeing_base(folder, kind, wide if name != "vit" else {**wide, **WIDE}, head)


def _data(task: str, folder: Path) -> Path:
    if task == "causal":
        made: list[dict[str, str]] = rows(40)
    elif task == "seq2seq":
        draw = random.Random(0)
        pairs = [draw.sample(WORDS, 2) for _ in range(40)]
        made = [
            {"input": f"{number} {first} {second}", "target": f"{second} {first}"}
            for number, (first, second) in enumerate(pairs)
        ]
    elif task in ("classification", "regression"):
        label = "label" if task == "classification" else "score"
        made = [{"text": row["text"], "label": row[label]} for row in labelled_rows(40)]
    elif task == "token_classification":
        return write_rows(folder / "rows.json", tagged_rows(40))
    elif task == "speech_to_text":
        made = save_recordings(folder, 40)
    else:
        kept = {"image_classification": ("label",), "image_text": ("caption",)}
        columns = kept.get(task, ("question", "answer"))
        made = [
            {"image": row["image"], **{column: row[column] for column in columns}}
            for row in save_pictures(folder / "pictures", 40)
        ]
        path = folder / "pictures" / "rows.json"
        path.write_text(json.dumps(made), encoding="utf-8")
        return path
    return write_rows(folder / "rows.json", made)
