"""A grid of forest plots: differences with intervals, one frame a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.report.style import INK, MUTED, WIDTH

_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "open": MUTED}
_MARKS = {"better": "o", "worse": "s", "open": "D"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ForestRow:
    """One difference to the baseline."""

    label: str
    value: float
    low: float | None
    high: float | None
    tone: str
    """`better`, `worse` or `open`: colour and mark."""


def forest_grid(groups: Mapping[str, Sequence[ForestRow]], axis: str, path: Path) -> None:
    """Draw one frame per group and write PNG and PDF.

    Args:
        groups: title -> rows, in the order in which they are drawn; the same labels in each.
        axis: label of the common horizontal axis.
        path: of the PNG; the PDF stands beside it.
    """
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    most = max(len(rows) for rows in groups.values())
    figure = Figure(figsize=(WIDTH, 0.5 + lines * (0.45 + 0.19 * most)), layout="constrained")
    grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, (title, rows) in zip(grid, groups.items(), strict=False):
        axes.set_title(title, fontsize=8, loc="left")
        _frame(axes, rows)
    for unused in grid[len(groups) :]:
        unused.set_visible(False)
    grid[0].invert_yaxis()
    figure.supxlabel(axis, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def _frame(axes: Axes, rows: Sequence[ForestRow]) -> None:
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, row in enumerate(rows):
        colour = _COLOURS[row.tone]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=1.6)
        axes.plot(row.value, place, _MARKS[row.tone], color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
