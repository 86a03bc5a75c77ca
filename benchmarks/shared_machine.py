"""A training alone and beside other busy programs, for several settings of idle OpenMP threads.

    python benchmarks/shared_machine.py [--busy 2] [--repeats 3] [--threads 2] [--steps 40]

Each setting is measured in a process of its own: a training of the embedded base with so many
threads of torch's, timed from its first to its last optimiser step, imports left out. Settings take
turns, so that a change of the machine's load falls on all; a round measures every setting alone and
then every setting beside `--busy` programs that do nothing but count. What is printed are medians
of the rounds, as multiples of the library's own setting alone.

Then two trainings run side by side, once with `--threads` threads each and once with a share of
them each, as `adaptive_lora.models.threads` gives it; the time is that of the slower one.

The machine has to be quiet otherwise. About two minutes a round on two quiet cores; the library's
own setting beside busy programs is the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adaptive_lora.models import threads

ROOT = Path(__file__).resolve().parents[1]
OWN = "library's own"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    # LIBRARY: no bound at all, as before there was one; GNU's is 300,000, fewer when crowded.
    OWN: {"LIBRARY": "1"},
    **{f"spin {n:,}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 1_000, 3_000, 10_000, 30_000)},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
COUNTING = "while True: pass"
TRAINING = """
import os, sys, time
steps, threads = int(sys.argv[1]), int(sys.argv[2])
if os.environ.pop("LIBRARY", None):
    import torch  # before the package, which then sets no bound
import adaptive_lora, torch
from adaptive_lora.config import study_from
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.runner.context import StudyContext
import tempfile, pathlib
torch.set_num_threads(threads)
config = study_from({
    "methods": "uniform:rank=4", "seeds": "0", "lr": "1e-2", "max_examples": 120,
    "max_steps": steps, "epochs": 1000, "validations": 1, "generate": "off", "precision": "fp32",
})
context = StudyContext(config)
(trial,) = config.trials()
times = []
with tempfile.TemporaryDirectory() as folder:
    print("ready", flush=True)
    sys.stdin.readline()
    place = pathlib.Path(folder) / "adapter"
    run_trial(context, trial, place, lambda event: times.append(time.monotonic()))
print(times[-1] - times[0], flush=True)
"""


class Training:
    """A process that has everything loaded and trains when told to."""

    def __init__(self, setting: Mapping[str, str], steps: int, count: int) -> None:
        """Start it and wait until it is ready."""
        named = (*threads._SPINNING, *threads._COUNT)
        environment = {key: value for key, value in os.environ.items() if key not in named}
        environment |= {"PYTHONPATH": str(ROOT), "ADAPTIVE_LORA_CACHE": "", **setting}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TRAINING, str(steps), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def start(self) -> None:
        """Let it train."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """Wait for its end; return how long it took."""
        out, _ = self._process.communicate()
        return float(out)


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Let so many programs count beside the block."""
    running = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(programs)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(setting: Mapping[str, str], steps: int, counts: list[int], programs: int) -> float:
    """Return the seconds of the slowest of trainings at once, each with so many threads."""
    trainings = [Training(setting, steps, count) for count in counts]
    with busy(programs):
        for training in trainings:
            training.start()
        return max(training.seconds() for training in trainings)


def main() -> None:
    """Measure in rounds, and print a table of ratios and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=2, help="programs that count")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="of a training")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a training")
    given = parser.parse_args()
    many, share = given.threads, max(1, given.threads // 2)
    chosen = {"GOMP_SPINCOUNT": threads.SPINS}
    cases = {
        **{(name, "alone"): (s, [many], 0) for name, s in SETTINGS.items()},
        **{(name, "beside"): (s, [many], given.busy) for name, s in SETTINGS.items()},
        ("one thread", "alone"): (chosen, [1], 0),
        ("one thread", "beside"): (chosen, [1], given.busy),
        (f"two trainings, {many} threads each", "alone"): (chosen, [many, many], 0),
        (f"two trainings, {many} threads each", "beside"): (chosen, [many, many], given.busy),
        (f"two trainings, {share} each", "alone"): (chosen, [share, share], 0),
        (f"two trainings, {share} each", "beside"): (chosen, [share, share], given.busy),
    }
    found: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(given.repeats):
        for case, (setting, counts, programs) in cases.items():
            found[case].append(measure(setting, given.steps, counts, programs))
            print(f"round {number + 1}  {case[0]}, {case[1]}: {found[case][-1]:.2f} s", flush=True)
    middle = {case: statistics.median(values) for case, values in found.items()}
    unit = middle[OWN, "alone"]
    print(f"\n{unit:.2f} s: {OWN}, alone, {many} threads. Multiples of it:")
    print(f"{'':<34}{'alone':>8}{f'beside {given.busy}':>10}")
    for name in dict.fromkeys(name for name, _ in cases):
        alone, beside = middle[name, "alone"] / unit, middle[name, "beside"] / unit
        print(f"{name:<34}{alone:>8.2f}{beside:>10.2f}")
    rows = [{"setting": n, "where": w, "seconds": found[n, w]} for n, w in found]
    print(json.dumps({"threads": many, "busy": given.busy, "measured": rows}))


if __name__ == "__main__":
    main()
