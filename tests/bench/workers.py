"""Trials per hour with one process of all threads, and with worker processes that share the cores.

    python tests/bench/workers.py [--workers 2] [--trials 12] [--steps 120] [--busy 0] [--repeats 3]

The same study on the embedded base runs with `--engine serial` and with `--workers`, in turns. What counts is the time
from the start of its first trial to the end of its last, over the number of trials: imports and loading are left out.
`--busy` programs that do nothing but count run beside both. The machine has to be quiet otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient

COUNTING = "while True: pass"


def seconds_per_trial(engine: list[str], trials: int, steps: int) -> float:
    """Return the wall time of a study's trials over their number."""
    words = [
        "study", "--methods", "uniform:rank=4", "--seeds", ",".join(map(str, range(trials))), "--lr", "3e-3",
        "--max-steps", str(steps), "--max-examples", "400", "--generate", "off", "--precision", "fp32",
    ]  # fmt: skip
    free = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "adaptive_lora.cli", *words, *engine]
        subprocess.run(command, cwd=folder, env=free, check=True, capture_output=True)
        client = MlflowClient(f"sqlite:///{Path(folder, 'mlflow.db')}")
        experiments = [item.experiment_id for item in client.search_experiments()]
        runs = client.search_runs(experiments, "tags.`adaptive_lora.kind` = 'trial'")
    assert len(runs) == trials
    return (max(run.info.end_time for run in runs) - min(run.info.start_time for run in runs)) / 1000 / trials


def main() -> None:
    """Measure in turns and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 2), ("trials", 12), ("steps", 120), ("busy", 0), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(given.busy)]
    found: dict[str, list[float]] = {"serial": [], "workers": []}
    try:
        for _ in range(given.repeats):
            found["serial"].append(seconds_per_trial(["--engine", "serial"], given.trials, given.steps))
            found["workers"].append(seconds_per_trial(["--workers", str(given.workers)], given.trials, given.steps))
    finally:
        for program in busy:
            program.kill()
    for name, values in found.items():
        print(f"{name:8} {statistics.median(values):6.2f} s a trial ({', '.join(f'{value:.2f}' for value in values)})")
    ratios = [one / other for one, other in zip(found["serial"], found["workers"], strict=True)]
    print(
        f"workers: {statistics.median(ratios):.2f} times the trials per hour ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
