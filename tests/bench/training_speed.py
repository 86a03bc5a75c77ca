"""Training speed beside what users have: `python tests/bench/training_speed.py --shared FOLDER`.

TRL's SFTTrainer, a plain padded PEFT loop with the model's own loss, and this package train the
same adapters on the same batches: the first 128 Alpaca rows, batch 8, rank 16 on all sites of a
GPT-2 of 6 layers, width 384 and 50,257 tokens, float32, 2 threads. Each runs in a process of its
own; they take turns step by step, with products of matrices in between, so that whatever else the
machine does meets all of them. Tokens are those of the examples; padding counts nothing. The first
step warms up, except SFTTrainer's with --quick.

SFTTrainer takes minutes a few steps, so it runs fewer of them; its ratio is over those it ran.
FOLDER holds data/alpaca_en_demo.json and models/gpt2-tokenizer. Under 8 minutes on 2 cores, with
--quick under 100 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_setting import useful_work

HERE = Path(__file__).resolve().parent
Step = dict[str, float]


class Contender:
    """A process that takes an optimiser step when told."""

    def __init__(self, name: str, shared: Path, loss_on: str) -> None:
        """Start it; it loads its model and waits."""
        command = [sys.executable, str(HERE / "speed_contenders.py"), name, str(shared), loss_on]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
        self.name, self.steps = name, list[Step]()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip

    def step(self) -> None:
        """Let it take one step and keep what it was."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            sys.exit(f"{self.name} ended: {self._process.stderr.read()[-2000:]}")
        self.steps.append(json.loads(line))

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def measure(shared: Path, loss_on: str, steps: int, sft_steps: int) -> dict[str, list[Step]]:
    """Run all contenders in turn; return the steps of each."""
    names = [name for name in ("product", "adaptive_lora", "plain_peft", "sft_trainer")]
    contenders = {name: Contender(name, shared, loss_on) for name in names}
    try:
        for step in range(steps):
            for name in ("product", "adaptive_lora", "product", "plain_peft", "product"):
                contenders[name].step()
            if step < sft_steps:
                contenders["sft_trainer"].step()
            print(f"step {step + 1} of {steps}", file=sys.stderr, flush=True)
    finally:
        for contender in contenders.values():
            contender.end()
    return {name: contender.steps for name, contender in contenders.items()}


def rate(steps: Sequence[Step], of: str = "tokens") -> float:
    """Return tokens, or work, a second over some steps."""
    return sum(step[of] for step in steps) / sum(step["seconds"] for step in steps)


def summary(found: Mapping[str, list[Step]], quick: bool) -> dict[str, Any]:
    """Return the figures: rates over all steps but the first, ratios over the same steps."""
    ours, plain, sft = (found[n][1:] for n in ("adaptive_lora", "plain_peft", "sft_trainer"))
    if quick:
        sft = found["sft_trainer"]
        beside_sft = found["adaptive_lora"][: len(sft)]
    else:
        beside_sft = ours[: len(sft)]
    work = sum(useful_work(int(s["tokens"]), int(s["supervised"])) for s in ours)
    peak = rate(found["product"][1:], "work")
    differences = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in zip(found["adaptive_lora"], found["plain_peft"], strict=True)
    ]
    return {
        "tokens_per_second": {
            "sft_trainer": rate(sft), "plain_peft": rate(plain), "adaptive_lora": rate(ours),
        },
        "ratio_vs_sfttrainer": rate(beside_sft) / rate(sft),
        "ratio_vs_plain_peft": rate(ours) / rate(plain),
        "gemm_fraction": work / sum(s["seconds"] for s in ours) / peak,
        "gemm_gflops": peak / 1e9,
        "max_relative_loss_difference": max(differences),
        "steps": {name: len(steps) for name, steps in found.items()},
        "supervised_share": sum(s["supervised"] for s in ours) / sum(s["tokens"] for s in ours),
    }  # fmt: skip


def main() -> None:
    """Measure and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--quick", action="store_true", help="3 steps, one of SFTTrainer's")
    parser.add_argument("--loss-on", choices=("response", "all"), default="response")
    given = parser.parse_args()
    if not (given.shared / "data" / "alpaca_en_demo.json").is_file():
        sys.exit(f"required: --shared FOLDER with data/alpaca_en_demo.json; {given.shared} is none")
    steps, sft_steps = (3, 1) if given.quick else (16, 10)
    found = summary(measure(given.shared, given.loss_on, steps, sft_steps), given.quick)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'':<16} {'tokens/s':>9} {'ours is':>9}")
    rates = found["tokens_per_second"]
    for name, ratio in (
        ("sft_trainer", found["ratio_vs_sfttrainer"]),
        ("plain_peft", found["ratio_vs_plain_peft"]),
        ("adaptive_lora", 1.0),
    ):
        print(f"{name:<16} {rates[name]:9.0f} {ratio:8.1f}x")
    print(
        f"useful work at {found['gemm_fraction']:.0%} of the rate of matrix products "
        f"({found['gemm_gflops']:.0f} GFLOP/s); losses differ from the plain loop's by at most "
        f"{found['max_relative_loss_difference']:.1g}, relative"
    )


if __name__ == "__main__":
    main()
