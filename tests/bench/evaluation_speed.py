"""Scoring beside the obvious loops: `python tests/bench/evaluation_speed.py --shared FOLDER`.

Likelihood per example: the padded loop in the data's order at batch 8 with whole logits, against
`evaluate` on packed rows. Greedy generation of 24 tokens: prompt by prompt, against batches sorted
by length. Both sides of a pair take turns, part by part, and who begins changes too; seconds are
processor time of all threads (other programs disturb it less than wall time). Threads sleep while
they wait for each other, so that waiting does not count. Model and data as in `training_speed.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported

import numpy as np
import speed_setting as setting
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from adaptive_lora.config import study_from
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import start_runtime
from adaptive_lora.models.tasks import CausalTask
from adaptive_lora.serving import generate

PARTS, PROMPTS, NEW = 4, 16, 24


@torch.no_grad()
def obvious(model: Any, data: Any) -> list[float]:
    """Return the likelihood per example by a padded loop."""
    found: list[float] = []
    for start in range(0, len(data), setting.BATCH):
        batch = setting.collate(data[start : start + setting.BATCH])
        logits = model(**batch.inputs).logits[:, :-1]
        labels = batch.labels[:, 1:]
        nll = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        found += nll.view_as(labels).sum(dim=1).tolist()
    return found


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function gives and the processor time that it took."""
    started = time.process_time()
    return function(), time.process_time() - started


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runtime = start_runtime("fp32", cpu=True)
    model = setting.adapted(setting.base()).eval()
    holder: Any = BaseModel.__new__(BaseModel)
    object.__setattr__(holder, "model", model.get_base_model())
    task = CausalTask(study_from({"batching": "packed", "eval_batch_size": 32}), runtime, holder)
    task.collate = setting.collate  # type: ignore[method-assign]
    data = setting.examples(given.shared, "response")
    tokenizer = AutoTokenizer.from_pretrained(given.shared / "models" / "gpt2-tokenizer")
    seconds = {"loop": 0.0, "evaluate": 0.0, "one_by_one": 0.0, "batched": 0.0}
    differences, ratios = [], []
    sides: dict[str, Callable[[Any], Any]] = {
        "loop": lambda some: obvious(model, some),
        "evaluate": lambda some: task.losses(model, some).nll_E,
    }
    size = len(data) // PARTS
    for side in sides.values():
        side(data[:8])  # the first pass of a process is a slow one
    for part in range(PARTS):
        chosen, found, took = data[part * size : (part + 1) * size], {}, {}
        for name in list(sides)[:: 1 if part % 2 else -1]:
            found[name], took[name] = timed(lambda name=name, some=chosen: sides[name](some))
            seconds[name] += took[name]
        ratios.append(took["loop"] / took["evaluate"])
        differences.append(float(np.max(np.abs(found["evaluate"] / np.array(found["loop"]) - 1))))
    prompts = [example.input_ids[: example.prompt_length] for example in data[:PROMPTS]]
    for name, batch_size in (("one_by_one", 1), ("batched", PROMPTS)):
        _, seconds[name] = timed(
            lambda size=batch_size: generate(model, tokenizer, prompts, max_new_tokens=NEW, batch_size=size)
        )
    print(
        json.dumps(
            {
                "seconds": seconds,
                "evaluation_ratio": seconds["loop"] / seconds["evaluate"],
                "evaluation_ratio_by_part": ratios,
                "generation_ratio": seconds["one_by_one"] / seconds["batched"],
                "max_relative_nll_difference": max(differences),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
