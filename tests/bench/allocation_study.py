"""Allocation at one budget on real text: Alpaca and GSM8K, eight ways to spend the same parameters.

Runs one study per data set over six paired seeds on the embedded base, with the rows that fit its
256 positions, and prints the verdicts. About 20 minutes on 2 cores; what is finished is kept:

    python tests/bench/allocation_study.py --data ../shared/data --work /tmp/allocation-study
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from adaptive_lora.adapter_serving import base_folder, render
from adaptive_lora.config import study_from
from adaptive_lora.data.templates import load_template
from adaptive_lora.study import run_study

SETS = {
    "alpaca": ("alpaca_en_demo.json", ("instruction", "input", "output")),
    "gsm8k": ("gsm8k_train.jsonl", ("question", "", "answer")),
}
METHODS = (
    "uniform:budget={0} linear_decay:budget={0} three_band:budget={0} "
    "empirical:budget={0} waterfill:budget={0} random:of=waterfill,budget={0} "
    "adalora:budget={0} truncate_retrain:budget={0}"
)
LONGEST, ROWS = 200, 240
"""Tokens of prompt and response together; rows per data set."""


def read_rows(path: Path, columns: tuple[str, str, str]) -> list[dict[str, str]]:
    """Return rows of a JSON or JSONL file in Alpaca's columns."""
    text = path.read_text(encoding="utf-8")
    items = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    names = ("instruction", "input", "output")
    return [
        {name: str(item.get(column, "")) for name, column in zip(names, columns, strict=True)}
        for item in items
    ]


def fitting(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the first rows whose prompt and response fit the base."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder("embedded", "embedded"))
    template = load_template("compact")
    kept = []
    for row in rows:
        text = render(template, row["instruction"], row["input"]) + row["output"]
        if row["output"].strip() and len(tokenizer(text)["input_ids"]) < LONGEST:
            kept.append(row)
        if len(kept) == ROWS:
            break
    return kept


def main() -> None:
    """Run both studies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two files")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--only", choices=tuple(SETS), help="one of the two")
    parser.add_argument("--budget", default="uniform-4", help="of every method")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, (file, columns) in SETS.items():
        if arguments.only not in (None, name):
            continue
        data = arguments.work / f"{name}.json"
        rows = fitting(read_rows(arguments.data / file, columns))
        data.write_text(json.dumps(rows), encoding="utf-8")
        study = study_from(
            {
                "study": name,
                "data": str(data),
                "template": "compact",
                "max_tokens": LONGEST,
                "methods": METHODS.format(arguments.budget),
                "seeds": "0 1 2 3 4 5",
                "lr": "6e-3",
                "epochs": 1,
                "validations": 1,
                "correction": "max_t",
                "precision": "fp32",
                "generate": "off",
                "tracking_uri": f"sqlite:///{arguments.work.resolve() / f'{name}.db'}",
                "output": str(arguments.work / "out"),
            }
        )
        outcome = run_study(study, Console(width=150))
        print(f"{name}: {outcome.judgement.comparison.headline}\n{outcome.judgement.report}")


if __name__ == "__main__":
    main()
