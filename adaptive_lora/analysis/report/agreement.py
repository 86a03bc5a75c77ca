"""Do allocations agree? Rank correlations as matrices."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Agreement, AgreementKind, Comparison
from adaptive_lora.analysis.comparison.wording import MINUS, signed
from adaptive_lora.analysis.report.grid import Frame, panels
from adaptive_lora.analysis.report.style import PAPER, WIDTH, folded, place_of
from adaptive_lora.analysis.report.svg import clean, mark
from adaptive_lora.results import FloatArray

_WRITTEN = 7
"""Labels up to which the numbers are written in."""


def seed_agreement(comparison: Comparison) -> Figure | None:
    """Draw one matrix of seeds x seeds per method whose ranks differ between seeds."""
    found = _of(comparison, AgreementKind.SEEDS)
    if not found:
        return None
    frame = Frame(height=1.2, left=0.24)
    figure, frames = panels(comparison, [one.about for one in found], frame, "correlation of ranks between seeds")
    for axes, one in zip(frames, found, strict=True):
        short = [label.removeprefix("seed ") for label in one.labels]
        ticks = slice(None, None, -(-len(short) // 10))
        _matrix(axes, one, place_of(comparison, one.about), size=5.0)
        places = np.arange(len(short)) + 0.5
        axes.set_xticks(places[ticks], short[ticks])
        axes.set_yticks(places[ticks], short[ticks])
        if one.mean is not None:
            axes.set_xlabel(f"mean {signed(one.mean, 2)}", fontsize=6)
    return figure


def method_agreement(comparison: Comparison) -> Figure | None:
    """Draw the matrices between methods, between metrics, and between tasks."""
    kinds = (AgreementKind.METHODS, AgreementKind.METRICS, AgreementKind.TASKS)
    found = [one for kind in kinds for one in _of(comparison, kind)]
    if not found:
        return None
    sides = [min(3.0, 0.9 + 0.3 * len(one.labels)) for one in found]
    height = sum(side + 0.5 for side in sides)
    figure = Figure(figsize=(WIDTH, height))
    top = height
    for one, side in zip(found, sides, strict=True):
        bottom = top - side - 0.24
        axes = figure.add_axes((1.62 / WIDTH, bottom / height, side / WIDTH, side / height))
        top = bottom - 0.26
        _matrix(axes, one, None, size=6.5)
        places = np.arange(len(one.labels)) + 0.5
        many = len(one.labels) > 8
        width, size = (40, 4.5) if many else (24, 6)
        names = [f"{folded(clean(label), width)}  {i}" for i, label in enumerate(one.labels, 1)]
        axes.set_yticks(places, names, fontsize=size)
        axes.set_xticks(places, [str(i + 1) for i in range(len(names))], fontsize=6)
        about = f" of {clean(one.about)}" if one.about else ""
        axes.set_title(f"between {one.kind}{about}", fontsize=7, loc="left", y=1.0, pad=3)
    return figure


def _of(comparison: Comparison, kind: AgreementKind) -> Sequence[Agreement]:
    return [one for one in comparison.agreements if one.kind is kind]


def _matrix(axes: Axes, one: Agreement, place: int | None, size: float) -> None:
    """Draw correlations from -1 to 1, first label on top; every cell says its number."""
    values: FloatArray = np.array([[np.nan if value is None else value for value in row] for row in one.matrix])
    axes.grid(False)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=mpl.colormaps["PuOr_r"],  # told apart by colour-blind people
        vmin=-1,
        vmax=1,
        edgecolors=PAPER,
        linewidth=0.5,
    )
    texts = [
        f"{one.about}{': ' if one.about else ''}{first} and {second}: "
        + ("nothing is ordered" if value is None else signed(value, 2))
        for first, row in zip(one.labels, one.matrix, strict=True)
        for second, value in zip(one.labels, row, strict=True)
    ]
    mark(mesh, place, texts)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    if len(one.labels) > _WRITTEN:
        return
    for (row, column), value in np.ndenumerate(values):
        text = "\N{EN DASH}" if np.isnan(value) else f"{value:z.1f}".replace("-", MINUS)
        colour = "#ffffff" if abs(value) > 0.7 else "#101418"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)
