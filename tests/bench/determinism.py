"""How far the same trial's numbers differ: `python tests/bench/determinism.py [--json]`.

Each method is trained on the embedded base and tasks (30 steps at batch 8, float32) in a process of
its own: twice alike, with more threads, and with the instruction sets of older processors, which
torch, oneDNN and MKL choose by environment variables. That is how other machines with the same
library versions compute; other versions and GPUs are not covered. The losses of all steps and of
the test are compared with the first process's by their relative difference, weights and ranks bit
for bit. `capability` is what torch says that it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

METHODS = ("uniform:rank=8", "waterfill:rank=8", "adalora:rank=8", "grow_prune:rank=8,interval=5")
THREADS = "OMP_NUM_THREADS"
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
SSE = {
    "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}  # fmt: skip
VARIANTS: dict[str, dict[str, str]] = {
    "one thread": {THREADS: "1"},
    "the same again": {THREADS: "1"},
    "AVX2": {THREADS: "1", **AVX2},
    "SSE": {THREADS: "1", **SSE},
    "2 threads": {THREADS: "2"},
    "2 threads again": {THREADS: "2"},
}
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads that wait do not spin, which would cost hours on a busy machine."""
MARK = "result: "


def main() -> None:
    """Train in all variants and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--steps", type=int, default=30, help="of a training [default: 30]")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="instead of the four")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(MARK + json.dumps(train(given.methods, given.steps)))
        return
    words = [sys.executable, __file__, "--here", "--steps", str(given.steps), "--methods"]
    runs = {}
    for name, variables in VARIANTS.items():
        runs[name] = apart([*words, *given.methods], variables)
        print(name, json.dumps(compared(runs["one thread"], runs[name])), file=sys.stderr)
    first = runs["one thread"]
    found = {name: compared(first, run) for name, run in runs.items() if run is not first}
    found["2 threads again"] |= {
        "weights_equal_to_2_threads": runs["2 threads"]["weights"] == runs["2 threads again"]["weights"]
    }
    if given.json:
        print(json.dumps({"processor": first["capability"], "found": found}, indent=1))
        return
    print(f"processor: {first['capability']}")
    for name, values in found.items():
        print(f"{name:<16} {json.dumps(values)}")


def apart(words: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """Train all methods in a fresh process with some environment variables."""
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **PATIENT, **variables})
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    result: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return result


def train(methods: list[str], steps: int) -> dict[str, Any]:
    """Train each method; return losses, ranks and digests of the weights."""
    import hashlib

    import torch

    from adaptive_lora.config import study_from
    from adaptive_lora.runner.context import StudyContext
    from adaptive_lora.runner.trial import run_trial

    torch.set_num_threads(int(os.environ[THREADS]))
    context = StudyContext(
        study_from(
            {
                "precision": "fp32", "max_examples": 400, "max_steps": steps, "epochs": 9,
                "batch_size": 8, "methods": " ".join(methods), "seeds": "0", "lr": "1e-3",
                "dropout": 0.1, "validations": 1, "generate": "off",
            }
        )
    )  # fmt: skip
    found: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability()}
    found |= {"losses": {}, "ranks": {}, "weights": {}}
    with TemporaryDirectory() as folder:
        for trial in context.config.trials():
            name = trial.method.label
            outcome = run_trial(context, trial, Path(folder) / name)
            found["losses"][name] = [*outcome.train.losses, outcome.test.loss]
            found["ranks"][name] = [site["rank"] for site in outcome.plan.to_dict()["sites"]]
            weights = (Path(folder) / name / "adapter_model.safetensors").read_bytes()
            found["weights"][name] = hashlib.sha256(weights).hexdigest()
    return found


def compared(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return how far a run is from the first, each method with its greatest relative difference."""
    differences = {
        name: max(abs(a - b) / abs(a) for a, b in zip(values, other["losses"][name], strict=True))
        for name, values in first["losses"].items()
    }
    return {
        "capability": other["capability"],
        "weights_equal": other["weights"] == first["weights"],
        "ranks_equal": [n for n, ranks in first["ranks"].items() if ranks == other["ranks"][n]],
        "greatest_relative_difference_of_losses": differences,
    }


if __name__ == "__main__":
    main()
