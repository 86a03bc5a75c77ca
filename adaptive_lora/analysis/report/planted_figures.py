"""Figure of planted ranks: the share of their gain that each method recovers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.comparison import wording as words
from adaptive_lora.analysis.comparison.findings import Headroom, Recovery
from adaptive_lora.analysis.report.style import WIDTH
from adaptive_lora.analysis.report.svg import INK, MUTED, clean, mark

_ROW, _HEAD, _REACH = 0.2, 0.62, 1.5
"""Inches of one method and of a panel's title and axis; the share beyond which intervals are cut."""


def recovered_of(comparison: Comparison) -> Figure | None:
    """Draw the shares that the methods of a comparison recover; None where there is nothing to recover."""
    return None if comparison.headroom is None else recovered([("", comparison.headroom)])


def recovered(cells: Sequence[tuple[str, Headroom]]) -> Figure | None:
    """Draw the recovered share of every method with its interval, one panel for each title and headroom.

    Cells without a share are left out; None where no cell has one.
    """
    shown = [(title, cell, [row for row in cell.methods if _drawn(row, cell)]) for title, cell in cells]
    shown = [entry for entry in shown if entry[2]]
    if not shown:
        return None
    heights = [_HEAD + _ROW * len(rows) for _, _, rows in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    frames = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, cell, rows) in zip(frames, shown, strict=True):
        for place, row in enumerate(rows):
            _draw(axes, row, place)
        for share in (0, 1):
            axes.axvline(share, color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
        axes.set_yticks(range(len(rows)), [clean(row.method) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-_REACH, _REACH)
        axes.set_xticks([-1, 0, 1], ["\N{MINUS SIGN}100 %", "uniform", "planted ranks"])
        axes.grid(False)
        if title:
            found = f"headroom {words.whole_percent(cell.share)} %" + (
                "" if cell.separates else ", not shown to separate"
            )
            axes.set_title(clean(f"{title}: {found}"), loc="right")
    return figure


def _drawn(row: Recovery, cell: Headroom) -> bool:
    return row.recovered is not None and row.method != cell.oracle


def _draw(axes: Axes, row: Recovery, place: int) -> None:
    """Draw one method: its share, and its interval cut at the frame."""
    assert row.recovered is not None
    text = f"{row.method}: {words.whole_percent(row.recovered)} %"
    if row.interval.low is not None and row.interval.high is not None:
        text += f" {words.interval_text(row.interval, words.whole_percent)}"
        ends = [min(max(end, -_REACH), _REACH) for end in (row.interval.low, row.interval.high)]
        axes.plot(ends, [place, place], color=INK, linewidth=1.6)
    shape = "<" if row.recovered < -_REACH else ">" if row.recovered > _REACH else "o"
    at = min(max(row.recovered, -_REACH), _REACH)
    (point,) = axes.plot([at], [place], shape, color=INK, markersize=4.5, clip_on=False)
    mark(point, None, [f"{text}. {row.verdict}"])
