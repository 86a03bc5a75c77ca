"""What profiling costs beside training: `python tests/bench/profile_cost.py [--json]`.

Embedded base and tasks, 200 training examples, 3 epochs at batch 8 of uniform rank 8, against every
metric on the default calibration batches. Each runs in a process of its own, so that peak memory
is its own. Seconds are the median of three after a first run, of wall time and of processor time
(other programs on the machine disturb the latter less).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

EXAMPLES, EPOCHS, BATCH, RANK = 200, 3, 8, 8
TRAINING = "training"


def main() -> None:
    """Measure all in processes of their own and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch [default: 1]")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.threads)))
        return
    from adaptive_lora.methods.importance import PROFILERS

    found = {name: apart(name, given.threads) for name in (TRAINING, *PROFILERS)}
    training = found[TRAINING]
    for values in found.values():
        for clock in ("wall_seconds", "cpu_seconds"):
            values[f"share_of_{clock}"] = values[clock] / training[clock]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'':<20} {'wall s':>8} {'share':>7} {'cpu s':>8} {'share':>7} {'peak MiB':>9}  stability")
    for name, values in found.items():
        print(
            f"{name:<20} {values['wall_seconds']:8.3f} {values['share_of_wall_seconds']:7.1%} "
            f"{values['cpu_seconds']:8.3f} {values['share_of_cpu_seconds']:7.1%} "
            f"{values['peak_bytes'] / 2**20:9.1f}  {values.get('stability') or math.nan:9.2f}"
        )


def apart(name: str, threads: int) -> dict[str, float]:
    """Measure one thing in a fresh process."""
    command = [sys.executable, __file__, "--only", name, "--threads", str(threads)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    values: dict[str, float] = json.loads(lines[-1])
    return values


def measure(name: str, threads: int) -> dict[str, float | None]:
    """Measure one metric, or the training, in this process."""
    import torch

    from adaptive_lora.config import study_from
    from adaptive_lora.methods.importance import profile_importance
    from adaptive_lora.runner.context import StudyContext

    torch.set_num_threads(threads)
    context = StudyContext(
        study_from(
            {
                "precision": "fp32", "max_examples": 267, "epochs": EPOCHS, "batch_size": BATCH,
                "methods": f"uniform:rank={RANK}", "validations": 1, "lr": "6e-3",
            }
        )
    )  # fmt: skip
    assert abs(len(context.splits(0).train) - EXAMPLES) <= 2, len(context.splits(0).train)
    if name == TRAINING:
        return clocked(lambda: train_once(context), repeats=1)
    task = context.profile_task(seed=0, fold=0)
    profile = profile_importance(task, metric=name, seed=0)
    values = clocked(lambda: profile_importance(task, metric=name, seed=0), repeats=3)
    return {**values, "stability": profile.to_dict()["stability"]}


def train_once(context: object) -> None:
    """Train uniform LoRA as a trial does."""
    from adaptive_lora.runner.trial_context import TrialOnBase

    (trial, *_) = context.config.trials()  # type: ignore[attr-defined]
    job = TrialOnBase(context, trial, lambda event: None)  # type: ignore[arg-type]
    try:
        trial.method.options.fit(job)
    finally:
        job.release()


def clocked(run: Callable[[], object], repeats: int) -> dict[str, float | None]:
    """Return median seconds after a first run, and that run's peak above what was held before."""
    before = psutil.Process().memory_info().rss
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {
        "wall_seconds": float(np.median(walls)),
        "cpu_seconds": float(np.median(processors)),
        "peak_bytes": float(max(0, peak - before)),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
