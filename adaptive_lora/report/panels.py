"""Figures with one small frame per method: rank maps, validation curves, learning rates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from adaptive_lora.comparison import Comparison, MethodSummary
from adaptive_lora.report.style import INK, MUTED, WIDTH, colour_of
from adaptive_lora.results import FloatArray, TrialRecord

_ROLE_ORDER = ("query", "key", "value", "qkv", "output", "up", "gate", "down", "other")


def _used(comparison: Comparison, records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Return per method the finished trials at its chosen rate."""
    used: dict[str, list[TrialRecord]] = {m.label: [] for m in comparison.methods}
    for record in records:
        method = comparison.method(record.method)
        if record.status == "FINISHED" and record.lr == method.lr and record.seed in method.seeds:
            used[record.method].append(record)
    return used


def _panels(number: int, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, 0.45 + rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[number:]:
        unused.set_visible(False)
    return figure, axes[:number]


def _folded(label: str, width: int = 22) -> str:
    """Return a label in lines of at most `width` characters, broken at its own separators."""
    lines, line = [], ""
    for piece in re.findall(r"[^-_]*[-_]?", label):
        if line and len(line + piece) > width:
            lines.append(line)
            line = ""
        line += piece
    return "\n".join([*lines, line])


def rank_maps(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw layers x roles per method as a heat map with the ranks written in."""
    maps = {
        label: _mean_ranks(trials)
        for label, trials in _used(comparison, records).items()
        if any(trial.plan.get("sites") for trial in trials)
    }
    if not maps:
        return None
    cells = {cell for ranks in maps.values() for cell in ranks}
    layers = sorted({layer for layer, _ in cells})
    found = {role for _, role in cells}
    roles = [role for role in _ROLE_ORDER if role in found]
    roles += sorted(found - set(roles))
    highest = max(max(ranks.values()) for ranks in maps.values())
    many = len(layers) > 12
    figure, panels = _panels(len(maps), 0.55 + 0.155 * len(layers))
    ticks = slice(None, None, 4 if many else 1)
    for axes, (label, ranks) in zip(panels, maps.items(), strict=True):
        values = np.array(
            [[ranks.get((layer, role), np.nan) for role in roles] for layer in layers]
        )
        _heat_map(axes, values, highest, 5.0 if many else 6.5)
        axes.set_title(_folded(label), fontsize=7, loc="left")
        axes.set_xticks(np.arange(len(roles)) + 0.5, roles, rotation=0 if len(roles) < 5 else 60)
        places = np.arange(len(layers)) + 0.5
        axes.set_yticks(places[ticks], [str(layer) for layer in layers[ticks]])
    figure.supylabel("layer", fontsize=8)
    return figure


def _heat_map(axes: Axes, values: FloatArray, highest: float, size: float) -> None:
    """Colour cells by value, the same colour for the same rank in every frame, and write it."""
    axes.grid(False)
    axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=mpl.colormaps["Blues"],
        vmin=-0.06 * highest,
        vmax=1.1 * highest,
        edgecolors="white",
        linewidth=0.6,
    )
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            text, colour = "\N{EN DASH}", MUTED
        else:
            text = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
            colour = "white" if value > 0.6 * highest else "#101418"
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour
        )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mean_ranks(trials: Sequence[TrialRecord]) -> Mapping[tuple[int, str], float]:
    """Return the mean rank per layer and role over trials, several sites of a role averaged."""
    ranks: dict[tuple[int, str], list[float]] = defaultdict(list)
    for trial in trials:
        for site in trial.plan.get("sites", ()):
            ranks[int(site["layer"]), str(site["role"])].append(float(site["rank"]))
    return {cell: float(np.mean(values)) for cell, values in ranks.items()}


def validation_curves(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw validation loss over optimiser steps per method, with the baseline behind."""
    curves = {
        label: _curve(trials)
        for label, trials in _used(comparison, records).items()
        if any(trial.validation_curve for trial in trials)
    }
    if not curves:
        return None
    figure, panels = _panels(len(curves), 1.3)
    # The loss before training would flatten everything that follows.
    late = np.array([v for _, _, low, high in curves.values() for v in (*low[1:], *high[1:])])
    reference = curves.get(comparison.baseline)
    for axes, (label, (steps, mean, low, high)) in zip(panels, curves.items(), strict=True):
        if reference is not None and label != comparison.baseline:
            axes.plot(reference[0], reference[1], color=MUTED, linewidth=1)
        colour = colour_of(comparison, label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=1.4)
        axes.set_title(_folded(label), fontsize=7, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    if late.size and np.ptp(late) > 0:
        room = 0.06 * float(np.ptp(late))
        panels[0].set_ylim(float(late.min()) - room, float(late.max()) + room)
    figure.supxlabel("optimiser step", fontsize=8)
    figure.supylabel("validation loss", fontsize=8)
    return figure


def _curve(
    trials: Sequence[TrialRecord],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps, mean, lowest and highest validation loss over the trials with that step."""
    at: dict[int, list[float]] = defaultdict(list)
    for trial in trials:
        for step, loss in trial.validation_curve:
            if np.isfinite(loss):
                at[step].append(loss)
    steps = sorted(at)
    return (
        steps,
        [float(np.mean(at[step])) for step in steps],
        [min(at[step]) for step in steps],
        [max(at[step]) for step in steps],
    )


def learning_rates(comparison: Comparison) -> Figure | None:
    """Draw validation loss over the learning rates tried; None where there was one."""
    shown = [
        m for m in comparison.methods if sum(r.validation.mean is not None for r in m.rates) > 1
    ]
    if not shown:
        return None
    figure, panels = _panels(len(shown), 1.3)
    rates = sorted({rate.lr for method in shown for rate in method.rates})
    for axes, method in zip(panels, shown, strict=True):
        _rate_curve(axes, method, colour_of(comparison, method.label))
        axes.set_xscale("log")
        axes.set_xticks(rates[:: max(1, len(rates) // 3)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_title(_folded(method.label), fontsize=7, loc="left")
    figure.supxlabel("learning rate", fontsize=8)
    figure.supylabel("validation loss", fontsize=8)
    return figure


def _rate_curve(axes: Axes, method: MethodSummary, colour: str) -> None:
    known = [rate for rate in method.rates if rate.validation.mean is not None]
    means = [rate.validation.mean or 0.0 for rate in known]
    deviations = [rate.validation.sd or 0.0 for rate in known]
    axes.errorbar(
        [rate.lr for rate in known],
        means,
        yerr=deviations,
        fmt="o-",
        color=colour,
        markersize=3,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
    )
    for rate, mean in zip(known, means, strict=True):
        if rate.chosen:
            axes.plot(
                [rate.lr], [mean], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK
            )
