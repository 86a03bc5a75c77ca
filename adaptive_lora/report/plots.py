"""Figures with all methods in one frame: paired differences, and loss against a cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adaptive_lora.comparison import Comparison, MethodSummary
from adaptive_lora.comparison.wording import count, interval_text, p_text, plain, signed
from adaptive_lora.report.style import (
    INK,
    MUTED,
    WIDTH,
    colour_of,
    marker_of,
    place_of,
    short_count,
)
from adaptive_lora.report.svg import clean, mark, mark_layout
from adaptive_lora.report.tables import p_decides

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
    mark_layout(figure, places, columns=1, step=(WIDTH, ROW), head=HEAD)
    axes.set_xlabel(f"test loss minus {clean(comparison.baseline)} (nats per token)")
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
        (bar,) = axes.plot(
            [interval.low, interval.high], [row + 0.08, row + 0.08], color=colour, linewidth=2.2
        )
        mark(bar, place, [f"{method.label}: {interval_text(interval)}"])
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


def loss_against_parameters(comparison: Comparison) -> Figure | None:
    """Draw mean test loss with its interval over parameters, and the front of both."""
    shown = [m for m in comparison.methods if m.loss.mean is not None and m.parameters.mean]
    if not shown:
        return None
    columns = 2 if len(shown) > 8 else 1
    figure = Figure(figsize=(WIDTH, 2.8 + 0.16 * -(-len(shown) // columns)), layout="constrained")
    axes = figure.subplots()
    for method in shown:
        _point(axes, comparison, method)
    front = pareto_front([(m.parameters.mean or 0.0, m.loss.mean or 0.0) for m in shown])
    axes.plot(*zip(*front, strict=True), ":", color=MUTED, linewidth=1, zorder=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.08)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("test loss (nats per token)")
    legend = figure.legend(
        loc="outside lower left", ncols=columns, fontsize=6 if columns > 1 else 7.5, columnspacing=1
    )
    for method, *parts in zip(shown, legend.legend_handles, legend.get_texts(), strict=True):
        for part in parts:
            if part is not None:
                mark(part, place_of(comparison, method.label))
    return figure


def _point(axes: Axes, comparison: Comparison, method: MethodSummary) -> None:
    mean, parameters = method.loss.mean or 0.0, method.parameters.mean or 0.0
    interval = method.loss_interval
    low = mean if interval.low is None else interval.low
    high = mean if interval.high is None else interval.high
    place, colour = place_of(comparison, method.label), colour_of(comparison, method.label)
    bar = axes.vlines(parameters, low, high, color=colour, linewidth=1.4)
    mark(bar, place)
    (point,) = axes.plot(
        [parameters],
        [mean],
        marker_of(comparison, method.label),
        color=colour,
        markersize=6,
        label=clean(method.label),
    )
    within = "" if interval.low is None else f", {plain(low)} to {plain(high)}"
    text = f"{method.label}: test loss {plain(mean)}{within}, {count(parameters)} parameters"
    mark(point, place, [text])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in cost and loss, from small cost to large."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
