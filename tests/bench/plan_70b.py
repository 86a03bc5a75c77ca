"""Seconds from the shell to a rank plan for an 80-layer Llama-70B, without weights.

Run `python tests/bench/plan_70b.py`; each figure is one cold process, imports included: seconds on
the clock, and seconds of processor time, which other work on the machine does not change.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import LlamaConfig

METHODS = ("uniform:rank=16", "linear_decay:rank=32,low_rank=8", "three_band:budget=uniform-16")


def main() -> None:
    """Print one line a method and form of output."""
    with TemporaryDirectory() as folder:
        LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        ).save_pretrained(folder)  # fmt: skip
        for method in METHODS:
            for form in ((), ("--json",), ("--emit", "peft")):
                seconds, processor, output = _plan(Path(folder), method, form)
                size = ""
                if form == ("--json",):
                    plan = json.loads(output)
                    size = f"{len(plan['sites'])} sites, {plan['total_parameters']:,} parameters"
                shown = f"{method:<34} {' '.join(form) or 'table':<12} {size}"
                print(f"{seconds:6.2f} s ({processor:5.2f})  {shown}")


def _plan(folder: Path, method: str, form: tuple[str, ...]) -> tuple[float, float, str]:
    words = ["plan", "--model", str(folder), "--method", method, *form]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "adaptive_lora.cli", *words], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, done.stdout.decode()


if __name__ == "__main__":
    main()
