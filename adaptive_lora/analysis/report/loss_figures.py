"""Figures of losses: paired differences, fronts, curves over steps and rates, and single examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from adaptive_lora.analysis.comparison import Comparison, Cost, MethodSummary, ParetoPoint
from adaptive_lora.analysis.comparison import wording as words
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.pairing import example_differences, used_trials
from adaptive_lora.analysis.comparison.types import MATCHED_SHARE
from adaptive_lora.analysis.report.style import (
    MOST_PARTS,
    WIDTH,
    Frame,
    colour_of,
    drawn,
    marker_of,
    panels,
    place_of,
    plot_marked,
    share_limits,
    short_bytes,
    short_count,
)
from adaptive_lora.analysis.report.svg import INK, MUTED, PAPER, clean, mark, mark_layout
from adaptive_lora.results import TrialRecord

ROW, HEAD = 0.42, 0.5
"""Inches of one method in the forest plot, and of the axis above all."""
_COSTS: Mapping[Cost, tuple[str, Callable[[float], str]]] = {
    Cost.TRAINED: ("parameters trained", lambda value: f"{words.count(value)} parameters"),
    Cost.SERVED: ("parameters served", lambda value: f"{words.count(value)} parameters"),
    Cost.TIME: ("training time (s)", "{:,.1f} s".format),
    Cost.MEMORY: ("peak memory", short_bytes),
}
"""Kind of cost -> name of its axis, and how one is written."""
_FRAME = Frame(height=1.0)
_MOST_POINTS = 300
"""Points drawn of a curve over examples: more than a frame has dots."""


def differences(comparison: Comparison) -> Figure | None:
    """Draw the paired difference of every method: seeds as dots, mean and interval below.

    The axis is on top, so that the page can leave rows out and cut the figure below.
    """
    shown = [comparison.method(label) for label in drawn(comparison)]
    shown = [method for method in shown if method.difference is not None]
    if not shown:
        return None
    many = sum(len(method.seeds) for method in shown) > MOST_PARTS
    height = HEAD + ROW * len(shown)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.02, 0, 0.96, 1 - HEAD / height))
    margin = comparison.margin.value
    if margin is not None:
        axes.axvspan(-margin, margin, color=MUTED, alpha=0.14, linewidth=0)
    axes.grid(False)  # lines would run through the labels
    reach = max(_row(axes, comparison, method, row, picture=many) for row, method in enumerate(shown))
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
    axes.set_xlabel(
        comparison.outcome.with_unit(f"{clean(comparison.outcome.name)} minus {clean(comparison.baseline)}")
    )
    return figure


def ladder(comparison: Comparison) -> Figure | None:
    """Draw the rungs of a ladder over their parameters, and the bracket around what an allocation could win.

    None without a ladder, and where no rung has an interval.
    """
    found = comparison.ladder
    if found is None or found.low is None or found.high is None:
        return None
    base = next(rung for rung in found.rungs if rung.method == found.base)
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    better = -comparison.outcome.sign
    axes.axhspan(base.loss + better * found.low, base.loss + better * found.high, color=MUTED, alpha=0.14, linewidth=0)
    axes.axhline(base.loss, color=MUTED, linewidth=1, linestyle=":", zorder=0)
    axes.plot([rung.parameters for rung in found.rungs], [rung.loss for rung in found.rungs], color=INK, linewidth=0.8)
    for rung in found.rungs:
        text = f"{rung.method}: {words.plain(rung.loss)}"
        if rung.interval.low is not None and rung.interval.high is not None:
            ends = base.loss + rung.interval.low, base.loss + rung.interval.high
            mark(axes.vlines(rung.parameters, *ends, color=INK, linewidth=1.4), None)
            text += f", difference {words.interval_text(rung.interval)}"
        (point,) = axes.plot([rung.parameters], [rung.loss], "o", color=INK, markersize=5)
        mark(point, None, [text])
        axes.annotate(
            clean(rung.method), (rung.parameters, rung.loss), (5, 5), textcoords="offset points", fontsize=7, color=INK
        )
    axes.margins(x=0.16, y=0.12)
    axes.set_xticks([rung.parameters for rung in found.rungs], [short_count(rung.parameters) for rung in found.rungs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(clean(comparison.outcome.title))
    return figure


def _row(axes: Axes, comparison: Comparison, method: MethodSummary, row: int, *, picture: bool) -> float:
    """Draw one method, its seeds as a picture if asked, and return how far from zero it reaches.

    The thick part of its bar is read for equivalence.
    """
    difference = method.difference
    assert difference is not None
    place, colour = place_of(comparison, method.label), colour_of(comparison, method.label)
    where = f"{words.signed(difference.mean)} {words.interval_text(difference.interval)}"
    ends = [difference.mean, *difference.values]
    bars = [(difference.interval, comparison.confidence, 2.2)]
    if difference.margin_tests is not None:
        bars.append((difference.margin_tests.interval, one_sided(comparison.confidence), 4.4))
    for interval, confidence, width in bars:
        if interval.low is not None and interval.high is not None:
            ends += [interval.low, interval.high]
            clause = f"{method.label}: {words.interval_clause(interval, confidence)}"
            look = {"color": colour, "linewidth": width, "solid_capstyle": "butt" if width > 4 else "projecting"}
            plot_marked(axes, place, [clause], [interval.low, interval.high], [row + 0.08, row + 0.08], **look)
    seeds = zip(difference.seeds, difference.values, strict=True)
    texts = [f"{method.label}, seed {seed}: {words.signed(value)}" for seed, value in seeds]
    look = {"color": colour, "alpha": 0.5, "markersize": 3, "markeredgewidth": 0, "rasterized": picture}
    plot_marked(axes, place, texts, difference.values, [row + 0.27] * len(difference.values), "o", **look)
    p = words.p_text(comparison.deciding_p(difference))
    text = f"{method.label}: {where}, corrected p {p}. {method.verdict.kind}"
    shape = marker_of(comparison, method.label)
    plot_marked(axes, place, [text], [difference.mean], [row + 0.08], shape, color=colour, markersize=6)
    plot_marked(axes, place, [], [0, 0], [row - 0.05, row + 0.4], color=INK, linewidth=0.8, zorder=1)
    across = axes.get_yaxis_transform()
    mark(axes.text(0.0, row - 0.2, clean(method.label), transform=across), place)
    mark(axes.text(1.0, row - 0.2, where, transform=across, ha="right", fontsize=7), place)
    return max(abs(end) for end in ends)


def pareto(comparison: Comparison, cost: Cost) -> Figure | None:
    """Draw mean test loss with its interval over a cost, and the front of both.

    None where the cost was not recorded, where all methods cost the same, and for trained
    parameters that are those served.
    """
    fronts = {front.cost: front for front in comparison.fronts}
    costs = {kind: {point.method: point.cost for point in front.points} for kind, front in fronts.items()}
    front = fronts.get(cost)
    if front is None or (cost is Cost.TRAINED and costs[cost] == costs.get(Cost.SERVED)):
        return None
    least, most = front.points[0].cost, front.points[-1].cost
    if most - least < MATCHED_SHARE * most:
        return None
    points = sorted(front.points, key=lambda point: place_of(comparison, point.method))
    methods = drawn(comparison)
    named = [point.method for point in points if point.method in methods]
    columns = 2 if len(named) > 8 else 1
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 + 0.16 * rows), layout="constrained")
    axes = figure.subplots()
    for point in points:
        _point(axes, comparison, point, cost, label=clean(point.method) if point.method in named else None)
    best = [(point.cost, point.loss) for point in front.points if point.on_front]
    axes.plot(*zip(*best, strict=True), ":", drawstyle="steps-post", color=MUTED, linewidth=1, zorder=0)
    short = short_bytes if cost is Cost.MEMORY else short_count
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08)
    axes.set_xlabel(_COSTS[cost][0])
    axes.set_ylabel(clean(comparison.outcome.title))
    legend = figure.legend(loc="outside lower left", ncols=columns, fontsize=6 if columns > 1 else 7.5, columnspacing=1)
    for method, *parts in zip(named, legend.legend_handles, legend.get_texts(), strict=True):
        for part in parts:
            if part is not None:
                mark(part, place_of(comparison, method))
    return figure


def _point(axes: Axes, comparison: Comparison, point: ParetoPoint, cost: Cost, *, label: str | None) -> None:
    interval = comparison.method(point.method).loss_interval
    place, colour = place_of(comparison, point.method), colour_of(comparison, point.method)
    text = f"{point.method}: {comparison.outcome.name} {words.plain(point.loss)}"
    if interval.low is not None and interval.high is not None:
        bar = axes.vlines(point.cost, interval.low, interval.high, color=colour, linewidth=1.4)
        mark(bar, place)
        text += f" ({words.plain(interval.low)} to {words.plain(interval.high)})"
    text += f", {_COSTS[cost][1](point.cost)}"
    if point.on_front:
        text += ", on the front"
    if point.front_share is not None:
        text += f"; on it in {100 * point.front_share:.0f} % of draws of seeds"
    shape = marker_of(comparison, point.method)
    plot_marked(axes, place, [text], [point.cost], [point.loss], shape, color=colour, markersize=6, label=label)


def validation_curves(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw validation loss over optimiser steps per method, with the baseline behind."""
    curves: dict[str, dict[int, list[float]]] = {}
    used = used_trials(comparison, records)
    for label in drawn(comparison):
        points = [point for trial in used[label] for point in trial.validation_curve]
        if points:
            finite = sorted((point for point in points if np.isfinite(point[1])), key=itemgetter(0))
            curves[label] = {step: [loss for _, loss in found] for step, found in groupby(finite, key=itemgetter(0))}
    if not curves:
        return None
    title = f"{comparison.outcome.with_unit('validation loss')} over optimiser step"
    figure, frames = panels(comparison, list(curves), _FRAME, title)
    means = {label: [float(np.mean(losses)) for losses in curve.values()] for label, curve in curves.items()}
    many = sum(map(len, curves.values())) > MOST_PARTS
    for axes, (label, curve) in zip(frames, curves.items(), strict=True):
        if comparison.baseline in curves and label != comparison.baseline:
            axes.plot(list(curves[comparison.baseline]), means[comparison.baseline], color=MUTED, linewidth=0.9)
        steps, colour = list(curve), colour_of(comparison, label)
        ranges = [*map(min, curve.values())], [*map(max, curve.values())]
        axes.fill_between(steps, *ranges, color=colour, alpha=0.25, linewidth=0)
        axes.plot(steps, means[label], color=colour, linewidth=1.3)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if many:
            continue
        texts = [
            f"{label}, step {step}: {words.plain(mean)} "
            f"({words.plain(min(losses))} to {words.plain(max(losses))}, {words.plural(len(losses), 'trial')})"
            for (step, losses), mean in zip(curve.items(), means[label], strict=True)
        ]
        plot_marked(axes, place_of(comparison, label), texts, steps, means[label], "o", color=colour, markersize=2.2)
    # The loss before training would flatten everything that follows.
    late = [loss for curve in curves.values() for losses in [*curve.values()][1:] for loss in losses]
    if late:
        share_limits(frames, min(late), max(late))
    return figure


def learning_rates(comparison: Comparison) -> Figure | None:
    """Draw validation loss over the learning rates tried; None where there was one."""
    shown = [comparison.method(label) for label in drawn(comparison)]
    shown = [m for m in shown if sum(r.validation.mean is not None for r in m.rates) > 1]
    if not shown:
        return None
    outcome = comparison.outcome
    validation = outcome.with_unit("validation loss" if outcome.is_loss else f"validation {clean(outcome.name)}")
    figure, frames = panels(comparison, [m.label for m in shown], _FRAME, f"{validation} over learning rate")
    rates = sorted({rate.lr for method in shown for rate in method.rates if rate.lr is not None})
    ends = []
    for axes, method in zip(frames, shown, strict=True):
        place = place_of(comparison, method.label)
        ends += _rate_curve(axes, method, place, colour_of(comparison, method.label))
        axes.set_xscale("log")
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        axes.set_xticks(rates[:: -(-len(rates) // 3)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    share_limits(frames, min(ends), max(ends))
    return figure


def _rate_curve(axes: Axes, method: MethodSummary, place: int, colour: str) -> list[float]:
    """Draw mean and deviation per rate; return what the scale has to hold."""
    known = [(r, r.lr, r.validation.mean) for r in method.rates if r.lr is not None and r.validation.mean is not None]
    means, rates = [mean for _, _, mean in known], [lr for _, lr, _ in known]
    low, high = ([mean + sign * (rate.validation.sd or 0.0) for rate, _, mean in known] for sign in (-1, 1))
    axes.vlines(rates, low, high, color=colour, linewidth=0.8)
    axes.plot(rates, means, color=colour, linewidth=1.2)
    texts = [
        f"{method.label}, rate {lr:g}: validation {words.plain(mean)}, test {words.plain(rate.test.mean)}, "
        f"{words.plural(rate.validation.seeds, 'seed')}" + (", chosen" if rate.chosen else "")
        for rate, lr, mean in known
    ]
    plot_marked(axes, place, texts, rates, means, "o", color=colour, markersize=3)
    for rate, lr, mean in known:
        if rate.chosen:
            axes.plot([lr], [mean], "o", markersize=8, markerfacecolor="none", color=INK)
    return [*low, *high]


def example_changes(
    comparison: Comparison, records: Sequence[TrialRecord], examples: Mapping[str, str]
) -> Figure | None:
    """Draw the difference to the baseline of every test example, sorted, one frame per method."""
    found = example_differences(comparison, records)
    found = {label: found[label] for label in drawn(comparison) if label in found}
    if not found:
        return None
    summed = clean(comparison.outcome.summed)
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
        colour = colour_of(comparison, label)
        axes.axhline(0, color=INK, linewidth=0.6)
        at_E = np.unique(np.linspace(0, diff_E.size - 1, _MOST_POINTS).round().astype(int))
        axes.fill_between(share_E[at_E], 0, diff_E[at_E], color=colour, alpha=0.3, linewidth=0)
        axes.plot(share_E[at_E], diff_E[at_E], color=colour, linewidth=1.2)
        at = [ids.index(change.example_id) for change in comparison.method(label).most_changed]
        texts = [f"{ids[i]}: {words.signed(diff_E[i], 2)} {summed}. {_short(examples.get(ids[i], ''))}" for i in at]
        plot_marked(
            axes, place_of(comparison, label), texts, share_E[at], diff_E[at], "o", color=colour, markersize=2.6
        )
        better = f"{100 * float(np.mean(comparison.outcome.sign * diff_E < 0)):.0f} % better"
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
        axes.text(0.04, 0.93, better, transform=axes.transAxes, fontsize=6, va="top", bbox=box)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100])
    values = [value for diff_by_id in found.values() for value in diff_by_id.values()]
    share_limits(frames, min(values), max(values))
    return figure


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}\N{HORIZONTAL ELLIPSIS}"
