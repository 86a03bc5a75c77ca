"""Peak memory and time of a study's start by the number of rows: `python benchmarks/data_memory.py`.

Texts are rows of an instruction, an input and an output (JSON Lines) for the embedded base, images JPEG files in
folders by class for a small ViT. Each line is a process of its own that reads the data, prepares them and makes
the batches of one epoch, without a model's passes. The first start fills the cache of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, tuple[int, ...]] = {"text": (100, 50_000), "images": (100, 10_000)}
"""Kind of data -> numbers of rows."""
WORDS = [f"{a}{b}" for a in ("ba", "ke", "mo", "zu", "ti", "ra") for b in ("lum", "nak", "rif", "dos", "vek", "mar")]


def main() -> None:
    """Measure each kind and number of rows twice, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=[*SIZES], action="append", help="only this kind of data")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "DATA", "MODEL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(*given.measure)))
        return
    print("| data | start | peak MiB | of it files | seconds to prepared data | seconds of an epoch's batches |")
    print("|---|---|---|---|---|---|")
    for kind in given.kind or SIZES:
        for rows in SIZES[kind]:
            with tempfile.TemporaryDirectory() as folder:
                data, model = made(kind, rows, Path(folder))
                for start in ("first", "second"):
                    found = apart(kind, data, model, Path(folder) / "cache")
                    print(
                        f"| {rows:,} {kind} | {start} | {found['peak']:,.0f} | {found['files']:,.0f} | "
                        f"{found['ready']:.1f} | {found['epoch']:.1f} |",
                        flush=True,
                    )


def apart(kind: str, data: str, model: str, cache: Path) -> dict[str, float]:
    """Measure one start in a fresh process."""
    environment = {**os.environ, "ADAPTIVE_LORA_CACHE": str(cache), "HF_HOME": str(cache / "hub")}
    command = [sys.executable, __file__, "--measure", kind, data, model]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    values: dict[str, float] = json.loads(said.splitlines()[-1])
    return values


def measured(kind: str, data: str, model: str) -> dict[str, float]:
    """Return peak resident memory in MiB, how much of the last are file pages, and seconds."""
    from adaptive_lora.cli.early import require_inputs
    from adaptive_lora.config import study_from

    task = {"text": "causal", "images": "image_classification"}[kind]
    options: dict[str, object] = {
        "model": model,
        "data": data,
        "task": task,
        "methods": "uniform:rank=2",
        "lr": "1e-3",
        "seeds": "0",
    }
    config = study_from({**options, "batch_size": 16})
    require_inputs(config)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    imported = time.perf_counter()
    from adaptive_lora.data import training_batches
    from adaptive_lora.runner.context import StudyContext

    context = StudyContext(config)
    assert context.fingerprint
    ready = time.perf_counter()
    train = context.splits(0).train
    batches = training_batches(train, batch_size=16, seed=0, collate=context.task.collate)
    for _ in range(len(train) // 16):
        next(batches)
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "files": _status("RssFile") / 1024,
        "ready": ready - imported,
        "epoch": time.perf_counter() - ready,
    }


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def made(kind: str, rows: int, folder: Path) -> tuple[str, str]:
    """Write data and, for images, a model; return both places."""
    return _texts(rows, folder) if kind == "text" else _images(rows, folder)


def _texts(rows: int, folder: Path) -> tuple[str, str]:
    chance, path = random.Random(0), folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            asked, given, answer = (" ".join(chance.choices(WORDS, k=k)) for k in (10, 20, 40))
            row = {"instruction": f"{number} {asked}", "input": given, "output": answer}
            file.write(json.dumps(row) + "\n")
    return str(path), "embedded"


def _images(rows: int, folder: Path) -> tuple[str, str]:
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    chance = np.random.default_rng(0)
    for number in range(rows):
        path = folder / "images" / f"class{number % 4}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(path, quality=90)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = ViTConfig(image_size=32, patch_size=8, **sizes)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return str(folder / "images"), str(folder / "model")


if __name__ == "__main__":
    main()
