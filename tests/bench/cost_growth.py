"""How cost grows with examples and parameters: `python tests/bench/cost_growth.py [--figure FILE]`.

Examples: whole trials (reading, division, tokens, training, tracking, test) over 1,000 to 50,000
rows on a GPT-2 of 2 layers; time per token must stay the same. What a trial costs before its first
row (loading the base, opening the store, the adapter's proof) is that of a trial of 100 rows and is
taken off, time and tokens. While one process runs a trial, another on the other core runs trials of
100 and 1,000 rows all the time, and the ratio of the two costs counts: a machine's speed changes
within minutes, and that meets both. At 1,000 rows both do the same, which shows the noise. One
thread each, because models this small only make threads wait for each other.

Parameters: one optimiser step of 8 examples of 128 tokens at 1 to 350 million parameters, rank 16
on all sites, float32; time per token must grow in proportion. Two threads; the median of three
steps after a first one.

All times are processor time, since other programs disturb it less than wall time; threads sleep
while they wait, so that waiting does not count. About 7 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported
os.environ["ADAPTIVE_LORA_CACHE"] = ""  # every trial makes its tokens itself

import speed_setting as setting
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import rows, save_byte_tokenizer

from adaptive_lora.config import study_from
from adaptive_lora.data import TokenizedExample
from adaptive_lora.models.base import count_parameters
from adaptive_lora.models.device import start_runtime
from adaptive_lora.models.kernels import fast_layers, packed_attention
from adaptive_lora.models.losses import causal_loss
from adaptive_lora.runner.steps import run_train

START, SMALL = 100, 1_000
"""Rows of the trial whose cost is taken off, and of the trials that run beside all others."""
SIZES = (1_000, 50_000, 1_000, 5_000, 20_000, 5_000, 1_000)
SHAPES = ((2, 128), (4, 256), (6, 512), (12, 768), (24, 1088))
"""Layers and width; with 4,096 tokens 1.1 to 347 million parameters."""
TOKENS, VOCABULARY = 128, 4_096


def over_examples(folder: Path, count: int, seed: int) -> tuple[int, float]:
    """Run one trial over so many rows; return its tokens and its processor time."""
    data = folder / f"{count}.json"
    data.write_text(json.dumps(rows(count)), encoding="utf-8")
    config = study_from(
        {
            "model": str(folder / "base"), "data": str(data), "template": "compact",
            "methods": "uniform:rank=4", "seeds": str(seed), "lr": "1e-3", "epochs": 1,
            "batch_size": 32, "generate": "off", "precision": "fp32",
            "output": str(folder / "out"), "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        }
    )  # fmt: skip
    started = time.process_time()
    outcome = run_train(config, None, Console(quiet=True)).outcome
    seconds = time.process_time() - started
    assert outcome is not None
    return outcome.train.tokens, seconds


@dataclass
class Costs:
    """Processor time and tokens of trials in one process, by rows."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def add(self, count: int, found: tuple[int, float]) -> None:
        """Keep what a trial of so many rows cost."""
        self.tokens[count] = found[0]
        self.seconds.setdefault(count, []).append(found[1])

    def per_token(self, count: int) -> float:
        """Return the time per token beyond that of a trial of few rows."""
        start, taken = (statistics.median(self.seconds[size]) for size in (START, count))
        return (taken - start) / (self.tokens[count] - self.tokens[START])


class Worker:
    """A process that runs trials, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Start it and let it do everything once: imports, the database, the first steps."""
        self.folder, self.seed = folder, 0
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), ready, (folder,))

    def submit(self, count: int) -> Future[tuple[int, float]]:
        """Run a trial over so many rows."""
        self.seed += 1
        return self._pool.submit(over_examples, self.folder, count, self.seed)

    def end(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def ready(folder: Path) -> None:
    """Prepare a worker."""
    warnings.filterwarnings("ignore")
    folder.mkdir()
    torch.set_num_threads(1)
    start_runtime("fp32", cpu=True)
    tiny_base(folder)
    over_examples(folder, 200, seed=0)


def by_examples(folder: Path) -> list[dict[str, Any]]:
    """Return by rows how many times the cost per token of small trials beside it a trial has."""
    measured, beside = Worker(folder / "measured"), Worker(folder / "beside")
    ratios: dict[int, list[float]] = {}
    costs: dict[int, list[float]] = {}
    tokens: dict[int, int] = {}
    try:
        for worker in (measured, beside):
            worker.submit(START).result()
        for count in SIZES:
            large, small = pair(measured, beside, count)
            tokens[count] = large.tokens[count]
            costs.setdefault(count, []).append(large.per_token(count))
            ratios.setdefault(count, []).append(large.per_token(count) / small.per_token(SMALL))
            print(f"{count} rows: {ratios[count][-1]:.3f}", file=sys.stderr)
    finally:
        measured.end()
        beside.end()
    return [
        {
            "examples": count,
            "tokens": tokens[count],
            "per_token": costs[count],
            "ratios": found,
            "ratio": statistics.median(found),
        }
        for count, found in sorted(ratios.items())
    ]


def pair(measured: Worker, beside: Worker, count: int) -> tuple[Costs, Costs]:
    """Run trials of so many rows, three where they are short, and small ones beside them."""
    large, small = Costs(), Costs()
    repeats = 3 if count <= SMALL else 1
    for rows_now in (START, count) * repeats + (START,):
        running = measured.submit(rows_now)
        while True:
            for size in (START, SMALL):
                small.add(size, beside.submit(size).result())
            if running.done():
                break
        large.add(rows_now, running.result())
    return large, small


def tiny_base(folder: Path) -> None:
    """Write a GPT-2 of 2 layers and width 64 with a byte tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=256,
        eos_token_id=256, pad_token_id=257, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    save_byte_tokenizer(folder / "base")


def over_parameters(layers: int, width: int) -> dict[str, float]:
    """Take optimiser steps with a model; return its processor time per token."""
    base = setting.base(layers, width, VOCABULARY)
    size = count_parameters(base)
    model = setting.adapted(base).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.RATE, fused=True)
    draw = torch.Generator().manual_seed(0)
    batch = setting.collate([_example(draw) for _ in range(setting.BATCH)])
    times = []
    with fast_layers(model), packed_attention(model):
        for _ in range(4):
            started = time.process_time()
            (causal_loss(model, batch) / batch.supervised_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - started)
    return {"parameters": size, "per_token": statistics.median(times[1:]) / batch.tokens}


def _example(draw: torch.Generator) -> TokenizedExample:
    ids = torch.randint(VOCABULARY - 1, (TOKENS,), generator=draw).tolist()
    return TokenizedExample(id="", input_ids=tuple(ids), first_label=1, prompt_length=1, response="")


def draw_figure(found: dict[str, Any], file: Path) -> None:
    """Draw time per token over examples and over parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [point["examples"] for point in found["examples"]]
    costs = [point["ratio"] for point in found["examples"]]
    left.axhspan(0.95, 1.05, color="0.9", label="within 10 % of each other")
    left.plot(sizes, costs, "o-", color="#0072B2")
    left.set(xscale="log", ylim=(0, 1.6), xlabel="examples")
    left.set_ylabel("time per token, as a multiple of\nthat of 1,000-example trials beside it")
    left.set_title("a trial beyond its start, by examples", loc="left", fontsize=10)
    left.legend(frameon=False, loc="lower left")
    sizes = [point["parameters"] for point in found["parameters"]]
    costs = [point["per_token"] * 1e3 for point in found["parameters"]]
    right.plot(sizes, costs, "o-", color="#0072B2", label="measured")
    line = [costs[-1] * size / sizes[-1] for size in sizes]
    right.plot(sizes, line, "--", color="0.5", label="in proportion to the largest")
    right.set(xscale="log", yscale="log", xlabel="parameters")
    right.set_ylabel("processor time per token (ms)")
    right.set_title("an optimiser step, by parameters", loc="left", fontsize=10)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, print JSON, and draw the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="PNG to write")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        examples = by_examples(Path(name))
    torch.set_num_threads(2)
    start_runtime("fp32", cpu=True)
    ratios = [point["ratio"] for point in examples]
    found = {
        "examples": examples,
        "spread": max(ratios) / min(ratios) - 1,
        "parameters": [over_parameters(*shape) for shape in SHAPES],
    }
    print(json.dumps(found, indent=1))
    if given.figure:
        draw_figure(found, given.figure)


if __name__ == "__main__":
    main()
