"""The figure of what was learned against what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison, MethodSummary
from adaptive_lora.analysis.comparison import wording as words
from adaptive_lora.analysis.comparison.findings import Change
from adaptive_lora.analysis.comparison.pairing import used_trials
from adaptive_lora.analysis.report.style import WIDTH, colour_of, drawn, marker_of, place_of, plot_marked
from adaptive_lora.analysis.report.svg import INK, MUTED, clean, mark
from adaptive_lora.results import TrialRecord


def learned_against_forgotten(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw what each method forgot of the retained data over what it learned: one frame a source, one below the other.

    None without retained data, and where the frozen base has no test loss.
    """
    base, sources = comparison.frozen_loss, comparison.retained
    shown = [method for method in map(comparison.method, drawn(comparison)) if method.forgetting]
    if base is None or not shown:
        return None
    columns = 2 if len(shown) > 8 else 1
    figure = Figure(figsize=(WIDTH, 2.8 * len(sources) + 0.16 * -(-len(shown) // columns)), layout="constrained")
    frames = figure.subplots(len(sources), 1, squeeze=False)[:, 0]
    used = used_trials(comparison, records)
    handles: dict[str, Artist] = {}
    for axes, source in zip(frames, sources, strict=True):
        axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
        if source.allowed is not None:
            axes.axhline(source.allowed, color=MUTED, linewidth=1, linestyle="--", zorder=0)
        for method in shown:
            if source.name in method.forgetting:
                change = method.forgetting[source.name].forgotten
                _point(axes, comparison, method, change, _learned(base, used[method.label]))
                handles.setdefault(method.label, axes.get_lines()[-1])
        axes.margins(x=0.08, y=0.08)
        of = f" of {clean(source.name)}" if len(sources) > 1 else ""
        axes.set_ylabel(f"forgotten{of} ({comparison.unit})")
    frames[-1].set_xlabel(f"learned ({comparison.unit})")
    legend = figure.legend(
        handles=list(handles.values()),
        loc="outside lower left",
        ncols=columns,
        fontsize=6 if columns > 1 else 7.5,
        columnspacing=1,
    )
    for label, *parts in zip(handles, legend.legend_handles, legend.get_texts(), strict=True):
        for part in parts:
            if part is not None:
                mark(part, place_of(comparison, label))
    return figure


def _learned(base_loss: float, trials: Sequence[TrialRecord]) -> dict[int, float]:
    """Return seed -> the frozen base's test loss minus that of the seed's trials, folds averaged."""
    by_seed = groupby(trials, key=lambda trial: trial.seed)
    losses = {seed: [trial.test.loss for trial in found if trial.test is not None] for seed, found in by_seed}
    return {seed: base_loss - float(np.mean(found)) for seed, found in losses.items()}


def _point(
    axes: Axes, comparison: Comparison, method: MethodSummary, change: Change, learned: dict[int, float]
) -> None:
    """Draw one method: seeds as dots, the bars of both intervals, and the mean."""
    losses, base = method.loss_interval, comparison.frozen_loss
    place, colour = place_of(comparison, method.label), colour_of(comparison, method.label)
    assert base is not None
    mean = float(np.mean([*learned.values()]))
    points = [(seed, learned[seed], value) for seed, value in zip(change.seeds, change.values, strict=True)]
    texts = [
        f"{method.label}, seed {seed}: learned {words.plain(x)}, forgot {words.signed(y)}" for seed, x, y in points
    ]
    look = {"color": colour, "alpha": 0.5, "markersize": 3, "markeredgewidth": 0}
    plot_marked(axes, place, texts, [x for _, x, _ in points], [y for _, _, y in points], "o", **look)
    text = f"{method.label}: learned {words.plain(mean)}"
    if losses.low is not None and losses.high is not None:
        ends = base - losses.high, base - losses.low
        mark(axes.hlines(change.mean, *ends, color=colour, linewidth=1.4), place)
        text += f" ({words.plain(ends[0])} to {words.plain(ends[1])})"
    text += f", forgot {words.signed(change.mean)}"
    if change.interval.low is not None and change.interval.high is not None:
        mark(axes.vlines(mean, change.interval.low, change.interval.high, color=colour, linewidth=1.4), place)
        text += f" {words.interval_text(change.interval)}"
    shape, label = marker_of(comparison, method.label), clean(method.label)
    plot_marked(axes, place, [text], [mean], [change.mean], shape, color=colour, markersize=6, label=label)
