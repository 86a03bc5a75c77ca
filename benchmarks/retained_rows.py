"""Rows of the tasks that the embedded base was pretrained on: `python -m benchmarks.retained_rows FILE`.

They are for `--retain-data`, and drawn anew; the invented languages of the embedded tasks are not among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from benchmarks.embedded_base.corpus import FAMILIES, WEIGHTS


def retained_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return different rows of instruction, input and output, each task as often as in pretraining."""
    rng = Random(f"retained {seed}")
    found: dict[tuple[str, str], dict[str, str]] = {}
    while len(found) < count:
        example = rng.choices(FAMILIES, WEIGHTS)[0].example(rng)
        row = {name: example[name] for name in ("instruction", "input", "output")}
        found.setdefault((row["instruction"], row["input"]), row)
    return list(found.values())


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=300, help="rows [default: 300]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows [default: 0]")
    given = parser.parse_args()
    lines = map(json.dumps, retained_rows(given.count, given.seed))
    given.file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
