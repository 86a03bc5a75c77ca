"""The cost of tracking one trial, by how many trials the study has stored already.

    python benchmarks/store_growth.py [--sizes 20 200 1000] [--repeats 5]

A SQLite store is filled with finished trials that carry as much as real ones (70 parameters, 25
tags, 30 metrics of which three are curves). At each size trials are taken, recorded and ended, once
as the package does it, which asks the store for the trial by its signature, and once as it did
before, which fetched all trials of the study and looked through them. Both are measured in the same
process, in turns, and as processor time of all threads, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Metric, Param, Run, RunTag

from adaptive_lora.config import TrackingConfig
from adaptive_lora.tracking import Recorder, Store, StudyRun, connect
from adaptive_lora.tracking.runs import KIND, SIGNATURE, STUDY_ID

STEPS = 20
"""Points of each curve."""
_IDENTITY = {"method": "uniform-r8", "fold": "0", "lr": "0.001"}


def tags_of(number: int) -> dict[str, str]:
    """Return the tags of a trial, as many as real ones have."""
    further = {f"tag{index}": "a value of some twenty letters" for index in range(18)}
    return {**_IDENTITY, **further, "seed": str(number), SIGNATURE: f"{number:016x}"}


def metrics_of() -> list[Metric]:
    """Return the metrics of a trial: three curves and 27 single numbers."""
    curves = [Metric(f"curve{c}", 1.0, 1, step) for c in range(3) for step in range(STEPS)]
    return curves + [Metric(f"metric{index}", 1.0, 1, 0) for index in range(27)]


def fill(store: Store, study: StudyRun, numbers: range) -> None:
    """Store finished trials."""
    client = store.client
    for number in numbers:
        tags = {**tags_of(number), STUDY_ID: study.study_id, KIND: "trial"}
        run_id = client.create_run(store.experiment_id, tags=tags).info.run_id
        params = [Param(f"cfg.setting{index}", "a value") for index in range(70)]
        client.log_batch(run_id, metrics_of(), params, [RunTag("more", "x")])
        client.set_terminated(run_id, "FINISHED")


def record(study: StudyRun, number: int) -> None:
    """Take a trial, record what a training gives, and end it."""
    run = study.take("trial", tags_of(number))
    assert isinstance(run, Recorder)
    with study.trial(run):
        for metric in metrics_of():
            run.metric(metric.key, metric.value, metric.step)
    assert run.flush(600)


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def by_looking_through(study: StudyRun) -> Callable[[str], list[Run]]:
    """Return the earlier way to find a trial's runs."""

    def runs_of(signature: str) -> list[Run]:
        return [run for run in study.children() if run.data.tags.get(SIGNATURE) == signature]

    return runs_of


def measure(study: StudyRun, size: int, repeats: int) -> dict[str, float]:
    """Return what a look-up and a whole trial cost in seconds, either way, with so many stored."""
    ways = {"signature": study.runs_of, "all": by_looking_through(study)}
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for name, way in ways.items():
            study.runs_of = way  # type: ignore[method-assign]
            number = 10**6 * (1 + size) + 2 * repeat + (name == "all")
            lookup = seconds(lambda way=way: way(f"{size // 2:016x}"))  # type: ignore[misc]
            trial = seconds(lambda number=number: record(study, number))  # type: ignore[misc]
            found.setdefault(f"lookup_by_{name}", []).append(lookup)
            found.setdefault(f"trial_by_{name}", []).append(trial)
    study.runs_of = ways["signature"]  # type: ignore[method-assign]
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Fill, measure at each size, and print a line each and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 200, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tracking = TrackingConfig(tracking_uri=f"sqlite:///{Path(folder)}/mlflow.db", output="out")
        store = connect(tracking)
        study = StudyRun.open(store, study_id="bench-1", name="bench")
        stored = 0
        for size in given.sizes:
            fill(store, study, range(stored, size))
            stored = size
            rows.append({"stored": size, **measure(study, size, given.repeats)})
            print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
        study.end("FINISHED")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
