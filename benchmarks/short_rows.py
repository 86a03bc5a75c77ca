"""Keep the rows of an Alpaca file whose texts are short together, for studies on a CPU.

    python benchmarks/short_rows.py alpaca_en_demo.json --characters 340 --output alpaca_short.json

The studies of docs/evidence.md take the 999 rows that LLaMA-Factory has in its `data/` folder; any
JSON list of objects with Alpaca's columns serves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLUMNS = ("instruction", "input", "output")


def main() -> None:
    """Write the rows and say how many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="JSON list with Alpaca's columns")
    parser.add_argument("--characters", type=int, default=340, help="most of all columns together")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.source.read_text(encoding="utf-8"))
    short = [row for row in rows if sum(len(row[name]) for name in COLUMNS) <= arguments.characters]
    arguments.output.write_text(json.dumps(short, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"{len(short):,} of {len(rows):,} rows -> {arguments.output}")


if __name__ == "__main__":
    main()
