"""Figures of losses: paired differences, fronts, curves over steps and rates, and single examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from adaptive_lora.analysis.comparison import Comparison, Cost, MethodSummary, ParetoFront, ParetoPoint
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.pairing import example_differences, used_trials
from adaptive_lora.analysis.comparison.types import MATCHED_SHARE
from adaptive_lora.analysis.comparison.wording import (
    count,
    interval_clause,
    interval_text,
    p_text,
    plain,
    plural,
    signed,
)
from adaptive_lora.analysis.report.style import (
    WIDTH,
    Frame,
    colour_of,
    marker_of,
    panels,
    place_of,
    share_limits,
    short_bytes,
    short_count,
)
from adaptive_lora.analysis.report.svg import INK, MUTED, PAPER, clean, mark, mark_layout
from adaptive_lora.results import TrialRecord

ROW, HEAD = 0.42, 0.5
"""Inches of one method in the forest plot, and of the axis above all."""
LABELS: Mapping[Cost, str] = {
    Cost.TRAINED: "parameters trained",
    Cost.SERVED: "parameters served",
    Cost.TIME: "training time (s)",
    Cost.MEMORY: "peak memory",
}
_FRAME = Frame(height=1.0)
_MOST_POINTS = 300
"""Points drawn of a curve over examples: more than a frame has dots."""


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
    p = p_text(comparison.deciding_p(difference))
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


def pareto(comparison: Comparison, cost: Cost) -> Figure | None:
    """Draw mean test loss with its interval over a cost, and the front of both.

    None where the cost was not recorded, where all methods cost the same, and for trained
    parameters that are those served.
    """
    fronts = {front.cost: front for front in comparison.fronts}
    front = fronts.get(cost)
    if front is None or (cost is Cost.TRAINED and _same(front, fronts.get(Cost.SERVED))):
        return None
    costs = [point.cost for point in front.points]
    if max(costs) - min(costs) < MATCHED_SHARE * max(costs):
        return None
    columns = 2 if len(front.points) > 8 else 1
    rows = -(-len(front.points) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 + 0.16 * rows), layout="constrained")
    axes = figure.subplots()
    points = sorted(front.points, key=lambda point: place_of(comparison, point.method))
    for point in points:
        _point(axes, comparison, point, front)
    best = [(point.cost, point.loss) for point in front.points if point.on_front]
    axes.plot(*zip(*best, strict=True), ":", drawstyle="steps-post", color=MUTED, linewidth=1, zorder=0)
    short = short_bytes if cost is Cost.MEMORY else short_count
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08)
    axes.set_xlabel(LABELS[cost])
    axes.set_ylabel(f"test loss ({comparison.unit})")
    legend = figure.legend(loc="outside lower left", ncols=columns, fontsize=6 if columns > 1 else 7.5, columnspacing=1)
    for point, *parts in zip(points, legend.legend_handles, legend.get_texts(), strict=True):
        for part in parts:
            if part is not None:
                mark(part, place_of(comparison, point.method))
    return figure


def _same(trained: ParetoFront, served: ParetoFront | None) -> bool:
    if served is None:
        return False
    return {p.method: p.cost for p in trained.points} == {p.method: p.cost for p in served.points}


def _point(axes: Axes, comparison: Comparison, point: ParetoPoint, front: ParetoFront) -> None:
    interval = comparison.method(point.method).loss_interval
    place, colour = place_of(comparison, point.method), colour_of(comparison, point.method)
    text = f"{point.method}: test loss {plain(point.loss)}"
    if interval.low is not None and interval.high is not None:
        bar = axes.vlines(point.cost, interval.low, interval.high, color=colour, linewidth=1.4)
        mark(bar, place)
        text += f" ({plain(interval.low)} to {plain(interval.high)})"
    (dot,) = axes.plot(
        [point.cost],
        [point.loss],
        marker_of(comparison, point.method),
        color=colour,
        markersize=6,
        label=clean(point.method),
    )
    text += f", {cost_text(point.cost, front.cost)}"
    if point.on_front:
        text += ", on the front"
    if point.front_share is not None:
        text += f"; on it in {100 * point.front_share:.0f} % of draws of seeds"
    mark(dot, place, [text])


def cost_text(value: float, cost: Cost) -> str:
    """Return a cost with its unit."""
    if cost is Cost.MEMORY:
        return short_bytes(value)
    if cost is Cost.TIME:
        return f"{value:,.1f} s"
    return f"{count(value)} parameters"


def validation_curves(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw validation loss over optimiser steps per method, with the baseline behind."""
    curves = {
        label: _curve(trials)
        for label, trials in used_trials(comparison, records).items()
        if any(trial.validation_curve for trial in trials)
    }
    if not curves:
        return None
    title = f"validation loss ({comparison.unit}) over optimiser step"
    figure, frames = panels(comparison, list(curves), _FRAME, title)
    reference = curves.get(comparison.baseline)
    for axes, (label, curve) in zip(frames, curves.items(), strict=True):
        steps = list(curve)
        if reference is not None and label != comparison.baseline:
            means = [float(np.mean(losses)) for losses in reference.values()]
            axes.plot(list(reference), means, color=MUTED, linewidth=0.9)
        mean = [float(np.mean(losses)) for losses in curve.values()]
        low, high = [min(v) for v in curve.values()], [max(v) for v in curve.values()]
        colour = colour_of(comparison, label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=1.3)
        (dots,) = axes.plot(steps, mean, "o", color=colour, markersize=2.2)
        texts = [
            f"{label}, step {step}: {plain(float(np.mean(losses)))} "
            f"({plain(min(losses))} to {plain(max(losses))}, {plural(len(losses), 'trial')})"
            for step, losses in curve.items()
        ]
        mark(dots, place_of(comparison, label), texts)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    # The loss before training would flatten everything that follows.
    late = [loss for curve in curves.values() for losses in [*curve.values()][1:] for loss in losses]
    if late:
        share_limits(frames, min(late), max(late))
    return figure


def _curve(trials: Sequence[TrialRecord]) -> Mapping[int, list[float]]:
    """Return step -> validation losses of the trials that have a finite one there."""
    at: dict[int, list[float]] = defaultdict(list)
    for trial in trials:
        for step, loss in trial.validation_curve:
            if np.isfinite(loss):
                at[step].append(loss)
    return {step: at[step] for step in sorted(at)}


def learning_rates(comparison: Comparison) -> Figure | None:
    """Draw validation loss over the learning rates tried; None where there was one."""
    shown = [m for m in comparison.methods if sum(r.validation.mean is not None for r in m.rates) > 1]
    if not shown:
        return None
    figure, frames = panels(
        comparison, [m.label for m in shown], _FRAME, f"validation loss ({comparison.unit}) over learning rate"
    )
    rates = sorted({rate.lr for method in shown for rate in method.rates})
    ends = []
    for axes, method in zip(frames, shown, strict=True):
        place = place_of(comparison, method.label)
        ends += _rate_curve(axes, method, place, colour_of(comparison, method.label))
        axes.set_xscale("log")
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        axes.set_xticks(rates[:: -(-len(rates) // 3)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(4))
    share_limits(frames, min(ends), max(ends))
    return figure


def _rate_curve(axes: Axes, method: MethodSummary, place: int, colour: str) -> list[float]:
    """Draw mean and deviation per rate; return what the scale has to hold."""
    known = [(r, r.validation.mean) for r in method.rates if r.validation.mean is not None]
    deviations = [rate.validation.sd or 0.0 for rate, _ in known]
    means, rates = [mean for _, mean in known], [rate.lr for rate, _ in known]
    low = [mean - sd for mean, sd in zip(means, deviations, strict=True)]
    high = [mean + sd for mean, sd in zip(means, deviations, strict=True)]
    axes.vlines(rates, low, high, color=colour, linewidth=0.8)
    axes.plot(rates, means, color=colour, linewidth=1.2)
    (dots,) = axes.plot(rates, means, "o", color=colour, markersize=3)
    texts = [
        f"{method.label}, rate {rate.lr:g}: validation {plain(mean)}, "
        f"test {plain(rate.test.mean)}, {plural(rate.validation.seeds, 'seed')}" + (", chosen" if rate.chosen else "")
        for rate, mean in known
    ]
    mark(dots, place, texts)
    for rate, mean in known:
        if rate.chosen:
            axes.plot([rate.lr], [mean], "o", markersize=8, markerfacecolor="none", color=INK)
    return [*low, *high]


def example_changes(
    comparison: Comparison, records: Sequence[TrialRecord], examples: Mapping[str, str]
) -> Figure | None:
    """Draw the difference to the baseline of every test example, sorted, one frame per method."""
    found = example_differences(comparison, records)
    if not found:
        return None
    summed = comparison.unit.partition(" per ")[0]
    figure, frames = panels(
        comparison,
        list(found),
        _FRAME,
        f"{summed} minus {comparison.baseline}, per test example, over share of examples (%)",
    )
    for axes, (label, diff_by_id) in zip(frames, found.items(), strict=True):
        ids = sorted(diff_by_id, key=lambda name: diff_by_id[name])
        diff_E = np.array([diff_by_id[name] for name in ids])
        share_E = 100 * (np.arange(diff_E.size) + 0.5) / diff_E.size
        colour, place = colour_of(comparison, label), place_of(comparison, label)
        axes.axhline(0, color=INK, linewidth=0.6)
        drawn = np.unique(np.linspace(0, diff_E.size - 1, _MOST_POINTS).round().astype(int))
        axes.fill_between(share_E[drawn], 0, diff_E[drawn], color=colour, alpha=0.3, linewidth=0)
        axes.plot(share_E[drawn], diff_E[drawn], color=colour, linewidth=1.2)
        chosen = [ids.index(c.example_id) for c in comparison.method(label).most_changed]
        (dots,) = axes.plot(share_E[chosen], diff_E[chosen], "o", color=colour, markersize=2.6)
        texts = [
            f"{ids[i]}: {signed(float(diff_E[i]), 2)} {summed}. {_short(examples.get(ids[i], ''))}" for i in chosen
        ]
        mark(dots, place, texts)
        better = f"{100 * float(np.mean(diff_E < 0)):.0f} % better"
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
        axes.text(0.04, 0.93, better, transform=axes.transAxes, fontsize=6, va="top", bbox=box)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100])
        axes.yaxis.set_major_locator(MaxNLocator(4))
    values = [value for diff_by_id in found.values() for value in diff_by_id.values()]
    share_limits(frames, min(values), max(values))
    return figure


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}\N{HORIZONTAL ELLIPSIS}"
