"""Figures with all methods in one frame: paired differences, and loss against parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adaptive_lora.comparison import Comparison
from adaptive_lora.comparison.wording import interval_text, signed
from adaptive_lora.report.style import INK, MUTED, WIDTH, colour_of, marker_of


def differences(comparison: Comparison) -> Figure | None:
    """Draw the paired difference of every method: seeds as dots, mean and interval below."""
    shown = [m for m in comparison.methods if m.difference is not None]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.75 + 0.5 * len(shown)), layout="constrained")
    axes = figure.subplots()
    margin = comparison.margin.value
    if margin is not None:
        axes.axvspan(-margin, margin, color=MUTED, alpha=0.12, linewidth=0)
    axes.grid(False)  # lines would run through the labels
    reach = 0.0
    for row, method in enumerate(shown):
        difference = method.difference
        assert difference is not None
        colour = colour_of(comparison, method.label)
        axes.plot(
            difference.values,
            np.full(len(difference.values), row + 0.14),
            "o",
            color=colour,
            alpha=0.45,
            markersize=3,
            markeredgewidth=0,
        )
        interval = difference.interval
        ends = [difference.mean, *difference.values]
        if interval.low is not None and interval.high is not None:
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2)
            ends += [interval.low, interval.high]
        marker = marker_of(comparison, method.label)
        axes.plot([difference.mean], [row], marker, color=colour, markersize=6)
        text = f"{signed(difference.mean)} {interval_text(interval)}"
        axes.plot([0, 0], [row - 0.16, row + 0.3], color=INK, linewidth=0.8, zorder=1)
        axes.text(0.0, row - 0.28, method.label, transform=axes.get_yaxis_transform())
        axes.text(
            1.0, row - 0.28, text, transform=axes.get_yaxis_transform(), ha="right", fontsize=7
        )
        reach = max(reach, *(abs(end) for end in ends))
    axes.set_xlim(-1.08 * reach or -1, 1.08 * reach or 1)
    axes.set_ylim(len(shown) - 0.55, -0.65)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"test loss minus {comparison.baseline} (nats per token)")
    return figure


def loss_against_parameters(comparison: Comparison) -> Figure | None:
    """Draw mean test loss with its interval over parameters, and the front of both."""
    shown = [m for m in comparison.methods if m.loss.mean is not None and m.parameters.mean]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 2.7 + 0.16 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for method in shown:
        mean = method.loss.mean or 0.0
        interval = method.loss_interval
        low = mean if interval.low is None else interval.low
        high = mean if interval.high is None else interval.high
        axes.errorbar(
            [method.parameters.mean or 0.0],
            [mean],
            yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
            fmt=marker_of(comparison, method.label),
            color=colour_of(comparison, method.label),
            markersize=6,
            elinewidth=1.4,
            capsize=2.5,
            label=method.label,
        )
    front = _front([(m.parameters.mean or 0.0, m.loss.mean or 0.0) for m in shown])
    axes.plot(*zip(*front, strict=True), ":", color=MUTED, linewidth=1, zorder=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.08)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("test loss (nats per token)")
    figure.legend(loc="outside lower left", ncols=1)
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in parameters and loss, from few to many."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
