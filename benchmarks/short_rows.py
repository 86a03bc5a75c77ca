"""Keep the rows of a JSON or JSONL file whose texts are short together, for studies on a CPU.

    python benchmarks/short_rows.py alpaca_en_demo.json --output alpaca_short.json
    python benchmarks/short_rows.py gsm8k_train.jsonl --characters 300 --output gsm8k_short.json

The studies of docs/evidence.md take the 999 Alpaca rows of `data/` in LLaMA-Factory
and the training file of GSM8K (openai/grade-school-math).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Write the rows and say how many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="JSON list of objects, or one object a line")
    parser.add_argument("--characters", type=int, default=340, help="most of a row's texts together")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    text = arguments.source.read_text(encoding="utf-8")
    lines = arguments.source.suffix == ".jsonl"
    rows = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    short = [
        row
        for row in rows
        if sum(len(value) for value in row.values() if isinstance(value, str)) <= arguments.characters
    ]
    arguments.output.write_text(json.dumps(short, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"{len(short):,} of {len(rows):,} rows -> {arguments.output}")


if __name__ == "__main__":
    main()
