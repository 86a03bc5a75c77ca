"""Figures with one small frame per method: validation curves, learning rates, examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from adaptive_lora.analysis.comparison import Comparison, MethodSummary
from adaptive_lora.analysis.comparison.wording import plain, plural, signed
from adaptive_lora.analysis.report.grid import Frame, panels, share_limits
from adaptive_lora.analysis.report.selection import example_differences, used_trials
from adaptive_lora.analysis.report.style import INK, MUTED, PAPER, colour_of, place_of
from adaptive_lora.analysis.report.svg import mark
from adaptive_lora.results import TrialRecord

_FRAME = Frame(height=1.0)
_MOST_POINTS = 300
"""Of a curve over examples: more than a frame has dots."""


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
