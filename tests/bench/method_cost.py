"""What each method costs beside LoRA: `python tests/bench/method_cost.py [--json]`.

Embedded base and tasks, 200 training examples, 3 epochs at batch 8 in float32, one thread of torch:
the setting of `profile_cost.py`. Each method runs in a process of its own, so that peak memory is
its own; with a knob it has the parameters of uniform rank 8. Processor seconds are those of the
whole recipe, the median of three trainings after a first one; memory is the first one's peak above
what the process held before. Rounds over all methods are interleaved with uniform rank 8, and
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

EXAMPLES, BATCH = 200, 8
LORA = "uniform:rank=8"
METHODS = (
    "uniform:rank=8,base=nf4", "uniform:rank=8,scaling=rslora", "uniform:rank=8,lora_plus=16",
    "uniform:rank=8,dora=true", "adalora:rank=8", "grow_prune:rank=8", "truncate:rank=8",
    "eva:rank=8", "gora:rank=8", "waterfill:rank=8",
    "prompt_tuning:tokens=20", "prefix_tuning:tokens=20", "p_tuning:budget=uniform-8", "ia3",
    "houlsby:budget=uniform-8", "pfeiffer:budget=uniform-8",
    "full", "bitfit", "ln_tuning", "head_only",
)  # fmt: skip


def main() -> None:
    """Measure all in processes of their own and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=3, help="of a training [default: 3]")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="instead of all")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.epochs)))
        return
    half = len(given.methods) // 2
    order = (LORA, *given.methods[:half], LORA, *given.methods[half:], LORA)
    runs = [(method, apart(method, given.epochs)) for method in order]
    found = {LORA: median([values for method, values in runs if method == LORA])}
    found |= {method: values for method, values in runs if method != LORA}
    for values in found.values():
        values["time_ratio"] = values["cpu_seconds"] / found[LORA]["cpu_seconds"]
        values["memory_ratio"] = values["peak_bytes"] / found[LORA]["peak_bytes"]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'method':<28} {'parameters':>10} {'cpu s':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for method, values in found.items():
        print(
            f"{method:<28} {values['parameters']:10,.0f} {values['cpu_seconds']:10.2f} "
            f"{values['time_ratio']:10.2f} {values['peak_bytes'] / 2**20:10.1f} "
            f"{values['memory_ratio']:10.2f}"
        )


def median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: float(np.median([values[name] for values in runs])) for name in runs[0]}


def apart(method: str, epochs: int) -> dict[str, float]:
    """Measure one method in a fresh process."""
    command = [sys.executable, __file__, "--only", method, "--epochs", str(epochs)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    values: dict[str, float] = json.loads(lines[-1])
    return values


def measure(method: str, epochs: int) -> dict[str, float]:
    """Train one method three times in this process."""
    import torch

    from adaptive_lora.config import study_from
    from adaptive_lora.runner.context import StudyContext
    from adaptive_lora.training.memory import peak as memory

    torch.set_num_threads(1)
    context = StudyContext(
        study_from(
            {
                "precision": "fp32", "max_examples": 267, "epochs": epochs, "batch_size": BATCH,
                "methods": method, "validations": 1, "lr": "1e-3", "generate": "off",
            }
        )
    )  # fmt: skip
    assert abs(len(context.splits(0).train) - EXAMPLES) <= 2, len(context.splits(0).train)
    before = psutil.Process().memory_info().rss
    peaks: list[int] = []
    count_anew = memory.count_anew

    def noted() -> int | None:
        """A training counts its own peak anew; what came before it belongs to the recipe too."""
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return count_anew()

    memory.count_anew = noted
    train_once(context)
    peak = max(*peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    runs = [train_once(context) for _ in range(2)]
    return {
        "cpu_seconds": min(seconds for seconds, _ in runs),
        "parameters": runs[0][1],
        "peak_bytes": float(max(0, peak - before)),
    }


def train_once(context: Any) -> tuple[float, float]:
    """Train as a trial does; return processor seconds of it all and parameters trained at once."""
    from adaptive_lora.runner.trial_context import TrialOnBase

    (trial, *_) = context.config.trials()
    job = TrialOnBase(context, trial, lambda event: None)
    started = time.process_time()
    try:
        trained = trial.method.options.fit(job)
    finally:
        job.release()
    return time.process_time() - started, float(trained.training_parameters)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
