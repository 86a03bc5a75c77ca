"""Several processes write runs into one store at once: is anything lost, and how fast is it?

    python tests/bench/concurrent_writers.py --uri http://127.0.0.1:5000 --writers 8 --runs 200

Each run has parameters, two metrics over its steps, an artifact and a final status, and is a trial
of one study. Everything is read back at the end. Exit code 1 where something is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

STUDY = "writers-0"
STEPS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What several writers did, and what was found."""

    writers: int
    runs: int
    seconds: float
    """Wall time from the first record to the last delivery, without imports."""
    metrics_sent: int
    metrics_found: int
    problems: tuple[str, ...]
    """What is missing or twice there."""


def _connect(uri: str, output: str):  # type: ignore[no-untyped-def]
    from adaptive_lora.config import TrackingConfig
    from adaptive_lora.tracking import connect

    return connect(TrackingConfig(tracking_uri=uri, output=output, experiment="writers"))


def _write(numbers: Sequence[int], uri: str, output: str, start: float) -> tuple[float, float]:
    """Write some runs; return when that began and ended. Runs in a process of its own."""
    from adaptive_lora.tracking import Recorder
    from adaptive_lora.tracking.runs import KIND, STUDY_ID

    store = _connect(uri, output)
    time.sleep(max(0.0, start - time.time()))
    began = time.time()
    for number in numbers:
        tags = {STUDY_ID: STUDY, KIND: "trial", "seed": str(number)}
        run = Recorder.begin(store, f"run {number}", tags)
        run.params({f"cfg.option{index}": index for index in range(40)})
        for step in range(STEPS):
            run.metric("train/loss", number + 1 / (step + 1), step)
            run.metric("train/tokens", 100.0 * step, step)
        run.json("plan.json", {"number": number})
        run.end("FINISHED")
    store.settle()
    store.close()
    return began, time.time()


def write_together(uri: str, output: Path, writers: int, runs: int) -> Outcome:
    """Let several processes write at once; read everything back."""
    from adaptive_lora.tracking import StudyRun

    store = _connect(uri, str(output))
    study = StudyRun.open(store, study_id=STUDY, name="writers")
    shares = [range(first, runs, writers) for first in range(writers)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adaptive_lora.tracking"])  # its imports take seconds
    write = partial(_write, uri=uri, output=str(output), start=time.time() + 5)
    with ProcessPoolExecutor(writers, context) as pool:
        times = list(pool.map(write, shares))
    problems, found = _read_back(study, runs)
    study.end("FINISHED")
    return Outcome(
        writers=writers,
        runs=runs,
        seconds=max(end for _, end in times) - min(begin for begin, _ in times),
        metrics_sent=runs * 2 * STEPS,
        metrics_found=found,
        problems=tuple(problems),
    )


def _read_back(study, runs: int) -> tuple[list[str], int]:  # type: ignore[no-untyped-def]
    children, client = study.children(), study.store.client
    problems = [] if len(children) == runs else [f"{len(children)} runs instead of {runs}"]
    seeds = [run.data.tags["seed"] for run in children]
    problems += [f"run {seed} is there twice" for seed in set(seeds) if seeds.count(seed) > 1]
    total = 0
    for run in children:
        number = int(run.data.tags["seed"])
        expected = {
            "train/loss": [(step, number + 1 / (step + 1)) for step in range(STEPS)],
            "train/tokens": [(step, 100.0 * step) for step in range(STEPS)],
        }
        for name, points in expected.items():
            history = client.get_metric_history(run.info.run_id, name)
            there = sorted((point.step, point.value) for point in history)
            total += len(there)
            if there != points:
                problems.append(f"run {number}: {len(there)} of {len(points)} points of {name}")
        if len(run.data.params) != 40 or run.info.status != "FINISHED":
            problems.append(f"run {number}: {run.info.status}, {len(run.data.params)} parameters")
        if study.store.read_json(run, "plan.json") != {"number": number}:
            problems.append(f"run {number}: another plan.json")
    return problems, total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--output", type=Path, default=Path("adaptive-lora-out"))
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    outcome = write_together(given.uri, given.output, given.writers, given.runs)
    print(
        f"{outcome.writers} writers, {outcome.runs} runs in {outcome.seconds:.1f} s "
        f"({outcome.runs / outcome.seconds:.1f} runs/s); metrics sent {outcome.metrics_sent}, "
        f"found {outcome.metrics_found}; {len(outcome.problems)} problems"
    )
    for problem in outcome.problems:
        print(problem)
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
