"""Peak memory of a training step beside the formula: `python tests/bench/memory.py [--json]`.

DialoGPT-medium's shape (24 layers, width 1024, 50,257 tokens; random weights, dropout 0) in
float32, uniform rank 8, a batch of 8 x 512 tokens, the way a trial under --max-memory trains: each
row in a process of its own, whose highest resident memory above that before the model was made is
the peak. The ratio is over what no implementation can do without: weights, adapters with gradients
and AdamW's moments, and the activations that LoRA's backward pass needs, as
`adaptive_lora/training/memory/estimate.py` counts them. Takes 12 GiB (padded: 21) and minutes;
--layers makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROWS = ("packed", "packed, 2 per forward pass", "packed, checkpointing", "padded")


def main() -> None:
    """Measure the rows in processes of their own and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=512, help="tokens of each example")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many of the rows")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given)))
        return
    found = {name: apart(name, given) for name in ROWS[: given.rows]}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print("| batch of 8 | peak GiB | needed GiB | ratio | expected GiB | at most GiB |")
    print("|---|---|---|---|---|---|")
    for name, values in found.items():
        gib = {key: value / 2**30 for key, value in values.items()}
        print(
            f"| {name} | {gib['peak']:.2f} | {gib['low']:.2f} | "
            f"{values['peak'] / values['low']:.2f} | {gib['expected']:.2f} | {gib['high']:.2f} |"
        )


def apart(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Measure one row in a fresh process."""
    sizes = ["--layers", str(given.layers), "--length", str(given.length)]
    command = [sys.executable, __file__, "--only", name, *sizes]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    values: dict[str, float] = json.loads(lines[-1])
    return values


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Return the peak of two steps and the formula's parts, in bytes."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from adaptive_lora.allocation import MethodSpec, allocate
    from adaptive_lora.config import study_from
    from adaptive_lora.config.types import Precision
    from adaptive_lora.data import TokenizedExample
    from adaptive_lora.methods.adapters import attach
    from adaptive_lora.models.base import gradient_checkpointing
    from adaptive_lora.models.device import start_runtime
    from adaptive_lora.models.sites import find_sites
    from adaptive_lora.models.tasks.causal import CausalTask
    from adaptive_lora.training import Trainer, TrainInputs
    from adaptive_lora.training.memory import estimate, load_of

    options: dict[str, object] = {"batch_size": 8, "max_steps": 2, "precision": "fp32"}
    micro, recompute = (2 if "2 per" in given.only else 8), "checkpointing" in given.only
    config = study_from({**options, "batching": given.only.split(",")[0]})
    runtime = start_runtime("fp32", cpu=True, sparing=True)
    warm_up(torch)
    before = peak()
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            n_embd=1024, n_layer=given.layers, n_head=16, vocab_size=50_257, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0,
        )
    ).requires_grad_(False)  # fmt: skip
    sites = find_sites(model)
    plan = allocate(MethodSpec.parse("uniform:rank=8"), sites)
    draw = np.random.default_rng(0)
    examples = [
        TokenizedExample(
            id=str(number),
            input_ids=tuple(draw.integers(0, 50_257, given.length).tolist()),
            first_label=given.length // 2,
            prompt_length=given.length // 2,
            response="",
        )
        for number in range(16)
    ]
    fast = config.train.batching != "padded"
    load = load_of(model, sites, plan, precision=Precision.FP32, longest=given.length, fused=fast, packed=fast)
    base: Any = SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=0))
    task = CausalTask(config, runtime, base)
    adapted = attach(model, plan, seed=0, dropout=0.0)
    inputs = TrainInputs(
        examples=examples, collate=task.collate, validate=lambda model: 0.0, loss=task.loss,
        running=task.running, micro_batch=micro,
    )  # fmt: skip
    with gradient_checkpointing(model, recompute):
        Trainer(adapted, inputs, config.train, runtime, lr=1e-4, seed=0).run()
    parts = estimate(load, examples=micro, checkpointing=recompute).to_dict()
    return {"peak": peak() - before, **parts}


def warm_up(torch: Any) -> None:
    """Load what every process holds: libraries, threads, buffers of matrix products."""
    weight = torch.randn(256, 256, requires_grad=True)
    torch.nn.functional.gelu(torch.randn(256, 256) @ weight).sum().backward()


def peak() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
