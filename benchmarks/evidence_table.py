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


def row(method: dict[str, Any], score: str, correction: str) -> str:
    """Return one method's line; `score` is the column beside the loss, `correction` that of the p that decides."""
    rates = [rate["lr"] for rate in method["rates"]]
    edge = " (edge)" if method["lr"] in (min(rates), max(rates)) and len(rates) > 1 else ""
    cells = [f"`{method['label']}`", f"{method['lr']:g}{edge}", f"{method['loss']['mean']:.4f}"]
    mean = method[score]["mean"]
    cells.append("" if mean is None else f"{mean:.1%}".replace("%", " %"))
    cells += [signed(found["forgotten"]["mean"]) for found in method.get("forgetting", {}).values()]
    difference = method["difference"]
    if difference is None:
        return "| " + " | ".join([*cells, "", "", "baseline"]) + " |"
    low, high = difference["interval"]["low"], difference["interval"]["high"]
    interval = "" if low is None else f" [{signed(low)}, {signed(high)}]"
    verdict = method["verdict"]["kind"]
    cells += [
        f"{signed(difference['mean'])}{interval}",
        f"{difference['tests'][correction]:.3g}",
        verdict.replace("_", " "),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print headline, table and warnings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="comparison.json of a report's folder")
    comparison = json.loads(parser.parse_args().comparison.read_text(encoding="utf-8"))
    print(comparison["headline"] + "\n")
    methods = comparison["methods"]
    exact = methods[0]["exact_match"]["mean"] is not None
    score = "exact_match" if exact else "token_accuracy"
    title = score.replace("_", " ")
    forgotten = [f"forgotten of {source['name']}" for source in comparison.get("retained", ())]
    correction = comparison["correction"]
    names = {"holm": "Holm", "max_t": "max-T", "benjamini_hochberg": "Benjamini and Hochberg"}
    heads = ["method", "rate", "test loss", title, *forgotten]
    heads += ["difference [95 %]", f"p ({names[correction]})", "verdict"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method in methods:
        print(row(method, score, correction))
    print(f"\nFrozen base {comparison['frozen_loss']:.4f}; {comparison['trials']} trials.")
    for entry in comparison["audit"]:
        if entry["kind"] != "ok":
            print(f"- {entry['topic']}: {entry['text']}")


if __name__ == "__main__":
    main()
