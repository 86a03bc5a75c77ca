"""Growth of a study to 10,000 trials: time and requests per trial, memory of the driver, comparison and report.

    python benchmarks/growth.py [--sizes 100 1000 10000] [--live 40] [--engine workers|ray|serial]

Trials are stubs (`growth_stub.py`): trained once a process, recorded like any other. Of each size all but `--live`
trials are put into a SQLite store as copies of real ones; then the study's command runs the others, compares all and
writes the report. A trial costs what the store's size makes it cost, whoever wrote the earlier ones. With `--live 0`
no trial is copied and all are run.

The command runs in a process of its own, whose maximum resident memory is that of the driver; workers are not part of
it. Requests are calls of MLflow's client and uploaded files in the processes that run trials.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS = {"study": "growth", "lr": "1e-2", "max_steps": 1, "max_examples": 64, "precision": "fp32"}
SEEDS = {100: 10, 1_000: 20, 10_000: 50}
"""Number of trials -> seeds; the others are methods."""
_OF_RUN = ("tags", "params", "metrics", "latest_metrics")
_OF_MODEL = ("logged_model_tags", "logged_model_params", "logged_model_metrics")


def settings(size: int, given: argparse.Namespace, folder: Path, uri: str) -> dict[str, Any]:
    """Return the settings of a study of so many trials."""
    seeds = SEEDS.get(size, 10)
    engine = {"workers": {"workers": 2}, "ray": {"engine": "ray", "workers": 2}, "serial": {"engine": "serial"}}
    return {
        **SETTINGS,
        **engine[given.engine],
        "methods": " ".join(f"stub:number={number}" for number in range(size // seeds)),
        "seeds": ",".join(map(str, range(seeds))),
        "tracking_uri": uri,
        "output": str(folder / "out"),
    }


def install(folder: Path) -> None:
    """Make the stub a plug-in of the processes whose PYTHONPATH has the folder."""
    (folder / "growth_stub.py").write_text((HERE / "growth_stub.py").read_text())
    about = folder / "growth_stub-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: growth-stub\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[adaptive_lora.methods]\nstub = growth_stub:Stub\n")
    (folder / "counts").mkdir()


def command(what: str, values: dict[str, Any], folder: Path, *further: str) -> dict[str, float]:
    """Run `--study` or `--multiply` in a process of its own; return its figures."""
    words = [sys.executable, str(Path(__file__).resolve()), what, json.dumps(values), *further]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "GROWTH_COUNTS": str(folder / "counts"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def study(values: dict[str, Any]) -> None:
    """Run a study, and print times, memory and the size of the page."""
    from rich.console import Console

    from adaptive_lora.config import study_from
    from adaptive_lora.runner import run

    marks = {"start": time.time()}

    def marked(name: str, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            marks[f"{name} begins"] = time.time()
            result = call(*args, **options)
            marks[f"{name} ends"] = time.time()
            return result

        return timed

    run.open_study = marked("open", run.open_study)
    run.comparison_input_of = marked("read", run.comparison_input_of)
    run.judge = marked("compare", run.judge)
    quiet = Console(file=io.StringIO())
    outcome = run.run_study(study_from(values), quiet)
    page = outcome.study_result.report()
    print()
    print(json.dumps({
        "open_s": marks["open ends"] - marks["open begins"],
        "read_s": marks["read ends"] - marks["read begins"],
        "compare_and_report_s": marks["compare ends"] - marks["compare begins"],
        "trials_run": outcome.trials_run,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "page_mb": page.stat().st_size / 1e6,
    }))  # fmt: skip


def multiply(values: dict[str, Any], live: int) -> None:
    """Copy finished runs until all trials but the last are there, and print the number of copies."""
    from adaptive_lora.config import study_from
    from adaptive_lora.runner.context import StudyContext
    from adaptive_lora.tracking.runs import SIGNATURE

    context = StudyContext(study_from(values))
    trials = list(context.config.trials())
    with sqlite3.connect("mlflow.db") as base:
        done = dict(
            base.execute(
                "SELECT t.value, t.run_uuid FROM tags t JOIN runs r USING (run_uuid) WHERE t.key = ? AND r.status = "
                "'FINISHED'",
                (SIGNATURE,),
            ).fetchall()
        )
        templates, copies = list(done.values()), 0
        for trial in trials[: len(trials) - live]:
            if (signature := context.signature(trial)) not in done:
                _copy(base, templates[copies % len(templates)], {
                    SIGNATURE: signature, "method": trial.method.label, "seed": str(trial.seed),
                    "order_digest": f"{trial.seed:016x}", "mlflow.runName": trial.label,
                    "adaptive_lora.run_key": uuid.uuid4().hex,
                })  # fmt: skip
                copies += 1
    base.close()
    print(json.dumps({"copied": copies}))


def _copy(base: sqlite3.Connection, template: str, tags: dict[str, str]) -> None:
    """Copy a run with its tags, parameters, metrics, inputs and logged model."""
    own, model = uuid.uuid4().hex, f"m-{uuid.uuid4().hex}"
    _rows(base, "runs", "run_uuid", template, {"run_uuid": own, "name": tags["mlflow.runName"]})
    for table in _OF_RUN:
        _rows(base, table, "run_uuid", template, {"run_uuid": own})
    for key, value in tags.items():
        base.execute("UPDATE tags SET value = ? WHERE run_uuid = ? AND key = ?", (value, own, key))
    made = base.execute("SELECT model_id FROM logged_models WHERE source_run_id = ?", (template,)).fetchone()
    if made is not None:
        _rows(base, "logged_models", "model_id", made[0], {"model_id": model, "source_run_id": own})
        for table in _OF_MODEL:
            _rows(base, table, "model_id", made[0], {"model_id": model, "run_id": own})
    links = base.execute(
        "SELECT source_type, source_id, destination_type, destination_id, step FROM inputs "
        "WHERE source_id = ? OR destination_id = ?",
        (template, template),
    ).fetchall()
    for kind, source, to_kind, to, step in links:
        changed = (own if source == template else source, own if to == template else model if made else to)
        base.execute(
            "INSERT INTO inputs (input_uuid, source_type, source_id, destination_type, destination_id, step) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (uuid.uuid4().hex, kind, changed[0], to_kind, changed[1], step),
        )


def _rows(base: sqlite3.Connection, table: str, key: str, value: str, changed: dict[str, str]) -> None:
    """Copy the rows of a table with a value of its key, some columns changed."""
    names = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
    columns = ", ".join("?" if name in changed else name for name in names)
    values = [changed[name] for name in names if name in changed]
    base.execute(f"INSERT INTO {table} SELECT {columns} FROM {table} WHERE {key} = ?", (*values, value))


def requests(folder: Path) -> tuple[float, float, dict[str, float]]:
    """Return seconds and requests per trial of one process, and the requests by name, over all but its first trials."""
    trials, seconds, found = 0, 0.0, dict[str, float]()
    for file in (folder / "counts").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()][1:]
        if len(lines) < 2:
            continue
        (first, before), (last, after) = lines[0], lines[-1]
        trials, seconds = trials + len(lines) - 1, seconds + last - first
        for name, count in after.items():
            found[name] = found.get(name, 0) + count - before.get(name, 0)
    each = {name: count / trials for name, count in sorted(found.items()) if count}
    return seconds / trials, sum(each.values()), each


def measure(size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one size."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        install(folder)
        values = settings(size, given, folder, f"sqlite:///{folder}/mlflow.db")
        copied: dict[str, float] = {}
        if given.live:
            few = {**values, "methods": " ".join(values["methods"].split()[:2]), "seeds": "0,1,2,3,4"}
            command("--study", few, folder)
            copied = command("--multiply", values, folder, "--live", str(given.live))
            for file in (folder / "counts").glob("*.jsonl"):
                file.unlink()
        found = command("--study", values, folder)
        seconds, number, each = requests(folder)
        return {"trials": size, **copied, **found, "trial_s": seconds, "requests": number, "by_name": each}


def main() -> None:
    """Measure each size, and print a line each and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--live", type=int, default=40, help="trials run by the measured command; 0: all")
    parser.add_argument("--engine", choices=("workers", "ray", "serial"), default="workers")
    parser.add_argument("--study", help=argparse.SUPPRESS)
    parser.add_argument("--multiply", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.study:
        study(json.loads(given.study))
        return
    if given.multiply:
        multiply(json.loads(given.multiply), given.live)
        return
    rows = []
    for size in given.sizes:
        rows.append(measure(size, given))
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items() if name != "by_name"), flush=True)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
