"""The forest plot: every method's paired difference to the baseline."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_lora.analysis.comparison import Comparison, MethodSummary
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import interval_clause, interval_text, p_text, signed
from adaptive_lora.analysis.report.style import INK, MUTED, WIDTH, colour_of, marker_of, place_of
from adaptive_lora.analysis.report.svg import clean, mark, mark_layout
from adaptive_lora.analysis.report.tables import p_decides

ROW, HEAD = 0.42, 0.5
"""Inches of one method in the forest plot, and of the axis above all."""


def differences(comparison: Comparison) -> Figure | None:
    """Draw the paired difference of every method: seeds as dots, mean and interval below.

    The axis is on top, so that the page can leave rows out and cut the figure below.
    """
    shown = [m for m in comparison.methods if m.difference is not None]
    if not shown:
        return None
    height = HEAD + ROW * len(shown)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.02, 0, 0.96, 1 - HEAD / height))
    margin = comparison.margin.value
    if margin is not None:
        axes.axvspan(-margin, margin, color=MUTED, alpha=0.14, linewidth=0)
    axes.grid(False)  # lines would run through the labels
    reach = max(_row(axes, comparison, method, row) for row, method in enumerate(shown))
    axes.set_xlim(-1.08 * reach or -1, 1.08 * reach or 1)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    ticks = MaxNLocator(7).tick_values(-reach, reach)
    axes.set_xticks([tick for tick in ticks if abs(tick) <= 0.95 * reach])  # labels have room
    places = [place_of(comparison, m.label) for m in shown]
    mark_layout(figure, places, columns=1, step=(0, ROW), head=HEAD)
    axes.set_xlabel(f"test loss minus {clean(comparison.baseline)} ({comparison.unit})")
    return figure


def _row(axes: Axes, comparison: Comparison, method: MethodSummary, row: int) -> float:
    """Draw one method and return how far from zero it reaches."""
    difference = method.difference
    assert difference is not None
    place, colour = place_of(comparison, method.label), colour_of(comparison, method.label)
    interval, ends = difference.interval, [difference.mean, *difference.values]
    where = f"{signed(difference.mean)} {interval_text(interval)}"
    if interval.low is not None and interval.high is not None:
        ends += [interval.low, interval.high]
        (bar,) = axes.plot([interval.low, interval.high], [row + 0.08, row + 0.08], color=colour, linewidth=2.2)
        mark(bar, place, [f"{method.label}: {interval_clause(interval, comparison.confidence)}"])
        _margin_interval(axes, comparison, method, row)
    (dots,) = axes.plot(
        difference.values,
        np.full(len(difference.values), row + 0.27),
        "o",
        color=colour,
        alpha=0.5,
        markersize=3,
        markeredgewidth=0,
    )
    seeds = zip(difference.seeds, difference.values, strict=True)
    mark(dots, place, [f"{method.label}, seed {seed}: {signed(value)}" for seed, value in seeds])
    shape = marker_of(comparison, method.label)
    (mean,) = axes.plot([difference.mean], [row + 0.08], shape, color=colour, markersize=6)
    p = p_text(p_decides(comparison, method))
    mark(mean, place, [f"{method.label}: {where}, corrected p {p}. {method.verdict.kind}"])
    (zero,) = axes.plot([0, 0], [row - 0.05, row + 0.4], color=INK, linewidth=0.8, zorder=1)
    mark(zero, place)
    across = axes.get_yaxis_transform()
    mark(axes.text(0.0, row - 0.2, clean(method.label), transform=across), place)
    numbers = axes.text(1.0, row - 0.2, where, transform=across, ha="right", fontsize=7)
    mark(numbers, place)
    return max(abs(end) for end in ends)


def _margin_interval(axes: Axes, comparison: Comparison, method: MethodSummary, row: int) -> None:
    """Draw the interval that equivalence reads as a thick part of the bar."""
    tests = method.difference.margin_tests if method.difference is not None else None
    if tests is None or tests.interval.low is None or tests.interval.high is None:
        return
    place, interval = place_of(comparison, method.label), tests.interval
    (bar,) = axes.plot(
        [tests.interval.low, tests.interval.high],
        [row + 0.08, row + 0.08],
        color=colour_of(comparison, method.label),
        linewidth=4.4,
        solid_capstyle="butt",
    )
    clause = interval_clause(interval, one_sided(comparison.confidence))
    mark(bar, place, [f"{method.label}: {clause}"])
