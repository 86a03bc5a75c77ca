"""Print the verdicts of a study as the Markdown table of docs/evidence.md.

python benchmarks/evidence_table.py adaptive-lora-out/STUDY-ID/comparison.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def signed(value: float) -> str:
    """Return a difference in nats or points with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def row(method: dict[str, Any]) -> str:
    """Return one method's line."""
    rates = [rate["lr"] for rate in method["rates"]]
    edge = " (edge)" if method["lr"] in (min(rates), max(rates)) and len(rates) > 1 else ""
    cells = [f"`{method['label']}`", f"{method['lr']:g}{edge}", f"{method['loss']['mean']:.4f}"]
    accuracy = method["exact_match"]["mean"]
    if accuracy is None:
        accuracy = method["token_accuracy"]["mean"]
    cells.append("" if accuracy is None else f"{accuracy:.1%}")
    difference = method["difference"]
    if difference is None:
        return "| " + " | ".join([*cells, "", "", "baseline"]) + " |"
    low, high = difference["interval"]["low"], difference["interval"]["high"]
    interval = "" if low is None else f" [{signed(low)}, {signed(high)}]"
    verdict = method["verdict"]["kind"]
    cells += [
        f"{signed(difference['mean'])}{interval}",
        f"{difference['tests']['holm']:.3g}",
        verdict.replace("_", " "),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print headline, table and warnings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="comparison.json of a report's folder")
    comparison = json.loads(parser.parse_args().comparison.read_text(encoding="utf-8"))
    print(comparison["headline"] + "\n")
    print("| method | rate | test loss | accuracy | difference [95 %] | p (Holm) | verdict |")
    print("|---|---|---|---|---|---|---|")
    for method in comparison["methods"]:
        print(row(method))
    print(f"\nFrozen base {comparison['frozen_loss']:.4f}; {comparison['trials']} trials.")
    for entry in comparison["audit"]:
        if entry["kind"] != "ok":
            print(f"- {entry['topic']}: {entry['text']}")


if __name__ == "__main__":
    main()
