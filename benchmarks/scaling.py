"""Test loss by rank, learning rate and scaling policy: which policies keep rank and rate apart.

Uniform ranks on the embedded base and tasks. At rank 16 every policy has the same factor (2): alpha
is 32 under `standard` and `constant`, 8 under `rslora`. Interrupted, the same command continues.

    python benchmarks/scaling.py --work scaling-study

Prints the table of docs/scaling.md and draws its figure.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

POLICIES = {"alpha / r": "", "alpha / sqrt(r)": ",scaling=rslora,alpha=8", "constant factor": ",scaling=constant"}
"""Shown name -> method options; factor 2 at rank 16 under each."""

Losses = Mapping[tuple[str, int], Mapping[float, float]]
"""(policy, rank) -> learning rate -> mean test loss over seeds, nats per token."""


def measured(arguments: argparse.Namespace) -> Losses:
    """Run what is missing of the study and return its mean test losses."""
    from rich.console import Console

    from adaptive_lora.allocation import MethodSpec
    from adaptive_lora.config import study_from
    from adaptive_lora.runner.comparison_input import Selection, read_comparison_input
    from adaptive_lora.runner.run import run_study

    methods = {
        f"uniform:rank={rank}{options}": (policy, rank)
        for policy, options in POLICIES.items()
        for rank in arguments.ranks
    }
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    study = study_from(
        {
            "study": "scaling",
            "methods": list(methods),
            "seeds": list(range(arguments.seeds)),
            "lr": arguments.rates,
            "baseline": MethodSpec.parse(f"uniform:rank={arguments.ranks[0]}").label,
            "epochs": arguments.epochs,
            "batch_size": 12,
            "max_tokens": 128,
            "validations": 1,
            "generate": "off",
            "precision": "fp32",
            "correction": "benjamini_hochberg",
            "tracking_uri": f"sqlite:///{work}/mlflow.db",
            "output": str(work / "out"),
        }
    )
    outcome = run_study(study, Console(width=140))
    names = {MethodSpec.parse(text).label: cell for text, cell in methods.items()}
    found: dict[tuple[tuple[str, int], float], list[float]] = defaultdict(list)
    for record in read_comparison_input(outcome.store, Selection()).records:
        if record.test is not None:
            found[names[record.method], record.lr].append(record.test.loss)
    losses: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for (cell, rate), values in sorted(found.items()):
        if len(values) == arguments.seeds:
            losses[cell][rate] = sum(values) / len(values)
    return losses


def table(losses: Losses, rates: Sequence[float]) -> str:
    """Return the losses as Markdown, each row's best in bold; a missing cell failed for a seed."""
    lines = ["| policy, rank | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for (policy, rank), row in losses.items():
        best = min(row.values())
        cells = [
            "-" if rate not in row else f"**{row[rate]:.2f}**" if row[rate] == best
            else f"{row[rate]:.2f}"
            for rate in rates
        ]  # fmt: skip
        lines.append(f"| {policy}, {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(losses: Losses, path: Path) -> None:
    """Draw one panel a policy: loss against learning rate, a line for each rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(POLICIES), figsize=(11, 3.6), sharey=True)
    ranks = sorted({rank for _, rank in losses})
    colours = plt.get_cmap("viridis")
    for axes, policy in zip(panels, POLICIES, strict=True):
        for index, rank in enumerate(ranks):
            row = losses[policy, rank]
            colour = colours(0.85 * index / max(1, len(ranks) - 1))
            axes.plot(list(row), list(row.values()), "o-", color=colour, label=f"rank {rank}")
            best = min(row, key=lambda rate: row[rate])
            axes.plot([best], [row[best]], "o", color=colour, markersize=11, fillstyle="none")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", title=policy)
        rates = sorted({rate for row in losses.values() for rate in row})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test loss (nats per token)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of store and figure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    losses = measured(arguments)
    print(table(losses, arguments.rates))
    draw(losses, arguments.work / "scaling.png")
    print(f"figure {arguments.work / 'scaling.png'}")


if __name__ == "__main__":
    main()
