"""The cost of tracking a study, by how many trials it has stored already.

    python benchmarks/store_growth.py [--sizes 20 200 1000] [--repeats 5]

A SQLite store is filled with finished trials that carry as much as real ones (70 parameters, 25
tags, 30 metrics of which three are curves). At each size the study is opened, which asks once for all
of its runs, and trials are begun, recorded and ended. Both are measured as processor time of all
threads, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag

from adaptive_lora.config import TrackingConfig
from adaptive_lora.tracking import Store, StudyRun, connect
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


def fill(store: Store, numbers: range) -> None:
    """Store finished trials."""
    client = store.client
    for number in numbers:
        tags = {**tags_of(number), STUDY_ID: "bench-1", KIND: "trial"}
        run_id = client.create_run(store.experiment_id, tags=tags).info.run_id
        params = [Param(f"cfg.setting{index}", "a value") for index in range(70)]
        client.log_batch(run_id, metrics_of(), params, [RunTag("more", "x")])
        client.set_terminated(run_id, "FINISHED")


def record(study: StudyRun, number: int) -> None:
    """Begin a trial, record what a training gives, and end it."""
    run = study.begin_trial("trial", tags_of(number), earlier=())
    with study.trial(run):
        for metric in metrics_of():
            run.metric(metric.key, metric.value, metric.step)
    assert run.flush(600)


def measure(tracking: TrackingConfig, size: int, repeats: int) -> dict[str, float]:
    """Return what opening a study and tracking one trial cost in seconds, with so many trials stored."""
    opening, trial = [], []
    for repeat in range(repeats):
        number = 10**6 * (1 + size) + repeat
        started = time.process_time()
        study = StudyRun.open(connect(tracking), study_id="bench-1", name="bench")
        opening.append(time.process_time() - started)
        started = time.process_time()
        record(study, number)
        trial.append(time.process_time() - started)
        study.end("FINISHED")
    return {"open": statistics.median(opening), "trial": statistics.median(trial)}


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
        stored = 0
        for size in given.sizes:
            fill(connect(tracking), range(stored, size))
            stored = size
            rows.append({"stored": size, **measure(tracking, size, given.repeats)})
            print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
