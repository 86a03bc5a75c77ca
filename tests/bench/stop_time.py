"""How soon SIGTERM and Ctrl-C end a study: `python tests/bench/stop_time.py [--json]`.

A real study on the embedded base (uniform rank 8, batch 8, one thread, SQLite) is stopped at random
moments of its first training, in turn by both signals, and begins anew in another folder. Wall time
from the signal to a whole checkpoint and to the end of the process; all runs must be KILLED.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from zygote import Zygote


def main() -> None:
    """Stop so many studies and print how long that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--stops", type=int, default=10, help="studies [default: 10]")
    parser.add_argument("--model", default="embedded", help="base [default: embedded]")
    given = parser.parse_args()
    draw, found = random.Random(0), []
    with TemporaryDirectory() as place, Zygote() as zygote:
        for number in range(given.stops):
            folder = Path(place) / str(number)
            folder.mkdir()
            kind = (signal.SIGTERM, signal.SIGINT)[number % 2]
            found.append(stop(zygote, folder, kind, draw.uniform(0, 3), given.model))
    result = {
        name: {"median": statistics.median(one[name] for one in found), "greatest": max(one[name] for one in found)}
        for name in found[0]
    }
    print(json.dumps(result, indent=1) if given.json else result)


def stop(zygote: Zygote, folder: Path, kind: signal.Signals, later: float, model: str) -> dict[str, float]:
    """Stop one study some seconds after its first steps; return seconds from the signal on."""
    store = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["study", f"--model={model}", "--methods=uniform:rank=8", "--seeds=0", "--lr=1e-3"]
    words += ["--max-steps=5000", "--epochs=5000", "--batch-size=8", f"--tracking-uri={store}"]
    pid = zygote.start(words, folder)
    output = folder / "adaptive-lora-out"
    while not any("train/loss" in path.read_text() for path in output.rglob("journal.jsonl")):
        time.sleep(0.05)
    time.sleep(later)
    began = time.monotonic()
    os.kill(pid, kind)
    while not any(".partial-" not in path.name for path in output.rglob("training1-step*")):
        time.sleep(0.005)
    checkpoint = time.monotonic() - began
    code = zygote.wait(pid)
    ended = time.monotonic() - began
    assert code == 128 + kind, (folder / "log.txt").read_text()
    statuses = {run.info.status for run in all_runs(store)}
    assert statuses == {"KILLED"}, statuses
    return {"seconds_to_checkpoint": checkpoint, "seconds_to_end": ended}


def all_runs(store: str) -> list[Any]:
    """Return the runs of a store."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    return list(client.search_runs([item.experiment_id for item in client.search_experiments()]))


if __name__ == "__main__":
    main()
