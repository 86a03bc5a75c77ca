"""Time from the tracking store to the verdict: 200 trials of 1,000 test examples.

Writes 20 methods x 10 seeds of made-up trials to a SQLite store as a study would, then reads and
compares them in a process of its own, and prints where the time goes:

    python tests/bench/compare_speed.py --work /tmp/compare-speed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

METHODS, SEEDS, EXAMPLES, STEPS, VALIDATIONS = 20, 10, 1_000, 500, 10
LAYERS, ROLES, WIDTH = 24, ("qkv", "output", "up", "down"), 1_024


def label(method: int) -> str:
    """Return a method's label; ranks 1 to 20 of uniform, so that all are known methods."""
    return f"uniform-r{method + 1}"


def plan(method: int) -> dict[str, object]:
    """Return the plan of a 24-layer GPT-2 of width 1,024."""
    sites = [
        {
            "name": f"transformer.h.{layer}.{role}",
            "layer": layer,
            "role": role,
            "in_features": WIDTH,
            "out_features": WIDTH,
            "rank": method + 1,
            "alpha": 2.0 * (method + 1),
            "parameters": 2 * WIDTH * (method + 1),
        }
        for layer in range(LAYERS)
        for role in ROLES
    ]
    total = sum(int(site["parameters"]) for site in sites)
    return {"method": label(method), "budget": None, "trainable_parameters": total, "sites": sites}


def write(folder: Path) -> None:
    """Write the study to a store in the folder."""
    from adaptive_lora.config import study_from
    from adaptive_lora.results import EvalResult
    from adaptive_lora.runner.recorded import BASE_SCORES, CONFIG
    from adaptive_lora.runner.recorded import EXAMPLES as TEXTS
    from adaptive_lora.tracking import StudyRun, connect
    from adaptive_lora.tracking.runs import PLAN, RESULT, eval_to_dict

    config = study_from(
        {
            "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
            "methods": " ".join(f"uniform:rank={m + 1}" for m in range(METHODS)),
            "seeds": ",".join(map(str, range(SEEDS))),
        }
    )
    shared = np.random.default_rng(0)
    tokens = shared.integers(10, 200, EXAMPLES)
    hardness = shared.normal(0, 0.4, EXAMPLES)
    ids = tuple(f"example-{index:05d}" for index in range(EXAMPLES))
    study = StudyRun.open(connect(config.tracking), study_id="speed-0", name="speed")

    def scores(loss: float, rng: np.random.Generator) -> EvalResult:
        return EvalResult(
            example_ids=ids,
            nll_E=tokens * (loss + hardness + rng.normal(0, 0.1, EXAMPLES)),
            tokens_E=tokens,
            correct_E=tokens // 2,
            exact_match_E=rng.integers(0, 2, EXAMPLES).astype(float),
        )

    study.json(CONFIG, {k: v for k, v in config.flat().items() if k != "tracking_uri"})
    study.json(BASE_SCORES, {"0": eval_to_dict(scores(3.0, shared))})
    study.json(TEXTS, {name: f"prompt of {name} " * 20 for name in ids})
    for seed in range(SEEDS):
        common = np.random.default_rng([seed, 1]).normal(0, 0.02)
        for method in range(METHODS):
            rng = np.random.default_rng([seed, method])
            loss = 1.2 + common + rng.normal(0, 0.01) - 0.001 * method
            test = scores(loss, rng)
            tags = {
                "method": label(method), "seed": str(seed), "fold": "0", "lr": "0.0003",
                "trial_signature": f"{method:08d}{seed:08d}", "precision": "bf16",
                "device": "cuda", "data_digest": "d", "base_hash": "b", "code_version": "c",
                "packages": "torch 2.13.0", "order_digest": str(seed), "data": "speed",
            }  # fmt: skip
            run = study.begin_trial(f"{label(method)}·seed{seed}", tags, earlier=())
            with study.trial(run):
                run.params({f"cfg.{key}": value for key, value in config.flat().items()})
                run.params({"method.name": "uniform", "method.rank": method + 1})
                trainer = np.linspace(3.0, loss, STEPS)
                for step, value in enumerate(trainer, 1):
                    run.metric("train/loss", float(value), step)
                for name in ("tokens_per_second", "peak_memory_bytes", "train_seconds"):
                    run.metric(name, 1_000.0 + method)
                run.flush()
                curve = [[int(s), float(trainer[s])] for s in range(0, STEPS, STEPS // VALIDATIONS)]
                run.json(
                    RESULT,
                    {
                        "losses": trainer.tolist(),
                        "validation_curve": curve,
                        "validation_tokens": [1_000 * step for step, _ in curve],
                        "validation_loss": float(loss),
                        "test": eval_to_dict(test),
                    },
                )
                run.json(PLAN, plan(method))
        print(f"wrote seed {seed}", flush=True)
    study.end("FINISHED")


def measure(folder: Path) -> None:
    """Read and compare; print seconds of every stage."""
    started = time.perf_counter()
    from adaptive_lora.analysis.report import About, write_report
    from adaptive_lora.config import TrackingConfig, study_from
    from adaptive_lora.runner.comparison_input import Selection, read_comparison_input
    from adaptive_lora.runner.result import compare_input
    from adaptive_lora.tracking import connect

    marks = {"imports": time.perf_counter()}
    store = connect(TrackingConfig(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"))
    comparison_input = read_comparison_input(store, Selection())
    marks["reading"] = time.perf_counter()
    comparison = compare_input(comparison_input, study_from({}), None)
    marks["comparison"] = time.perf_counter()
    about = About(title="speed", examples=comparison_input.examples)
    write_report(comparison, comparison_input.records, folder / "report", about)
    marks["report"] = time.perf_counter()
    seconds = {}
    for name, mark in marks.items():
        seconds[name] = round(mark - started, 2)
        started = mark
    seconds["imports, reading and comparison"] = round(
        seconds["imports"] + seconds["reading"] + seconds["comparison"], 2
    )
    print(json.dumps({"trials": len(comparison_input.records), "seconds": seconds}, indent=1))


def main() -> None:
    """Write the study where it is missing, then measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the store")
    parser.add_argument("--measure", action="store_true", help="only measure, in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.work.resolve())
        return
    folder = arguments.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        os.chdir(folder)  # artifacts of the default store go beside it
        write(folder)
    words = [sys.executable, str(Path(__file__).resolve()), "--work", str(folder), "--measure"]
    subprocess.run(words, check=True, cwd=folder)


if __name__ == "__main__":
    main()
