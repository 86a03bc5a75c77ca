"""One look for all figures: sizes, colours and markers of methods, and small frames.

Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart; marker and
label say the same. Frames have one size each, so that the page can rearrange them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_lora.analysis.comparison import Comparison, MethodSummary
from adaptive_lora.analysis.report.svg import MUTED, PAPER, clean, mark, mark_layout
from adaptive_lora.results import FloatArray

WIDTH = 4.7
"""Inches of a figure with all methods in one frame: legible at the width of a phone."""
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
ROLE_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#6a6d75")
"""Colours of the roles in a layer, in the order in which data flow."""
_MARKERS: Final = {
    "o": "\N{BLACK CIRCLE}",
    "s": "\N{BLACK SQUARE}",
    "D": "\N{BLACK DIAMOND}",
    "^": "\N{BLACK UP-POINTING TRIANGLE}",
    "v": "\N{BLACK DOWN-POINTING TRIANGLE}",
    "P": "\N{HEAVY GREEK CROSS}",
    "X": "\N{HEAVY MULTIPLICATION X}",
    "<": "\N{BLACK LEFT-POINTING TRIANGLE}",
    ">": "\N{BLACK RIGHT-POINTING TRIANGLE}",
    "*": "\N{BLACK STAR}",
}
"""Matplotlib's name of a marker -> the symbol for it in text."""
COLUMNS, PITCH = 4, 1.65
"""Frames beside each other in a paper, and inches from one to the next."""
_HEAD, _LINE = 0.24, 0.125
"""Inches of the line that says what is drawn, and of one line of a frame's title."""
STYLE: Final = Path(__file__).with_name("report.mplstyle")
"""Matplotlib's settings for all figures; its ink, grey and line are `INK`, `MUTED` and `LINE`."""


MOST_METHODS = 32
"""Methods up to which figures, terminal and examples show all; of more they show the best, tables all of them."""
MOST_PARTS = 4_000
"""Cells, bars or points of a figure up to which each says its number on hover; more are drawn as a picture."""


def drawn(comparison: Comparison) -> tuple[str, ...]:
    """Return the methods to show where not all can be: baseline, champion and the best, in their order."""
    sign = comparison.outcome.sign

    def order(method: MethodSummary) -> tuple[bool, float]:
        first = method.label in (comparison.baseline, comparison.winner)
        return not first, math.inf if method.loss.mean is None else sign * method.loss.mean

    best = {method.label for method in sorted(comparison.methods, key=order)[:MOST_METHODS]}
    return tuple(method.label for method in comparison.methods if method.label in best)


def drawn_clause(comparison: Comparison) -> str:
    """Return which methods are shown, to follow a number and a verb; empty where all are."""
    methods, outcome = len(comparison.methods), comparison.outcome
    if methods <= MOST_METHODS:
        return ""
    best = f"those with the {'highest' if outcome.higher_is_better else 'lowest'} mean {outcome.name}"
    return f"{MOST_METHODS} of {methods} methods: {comparison.baseline}, the champion and {best}"


def place_of(comparison: Comparison, label: str) -> int:
    """Return a method's place in the comparison, by which the page finds what is its own."""
    return comparison.places[label]


def colour_of(comparison: Comparison, label: str) -> str:
    """Return a method's colour, the same in all figures; the baseline is grey."""
    if label == comparison.baseline:
        return MUTED
    place, baseline = comparison.places[label], comparison.places[comparison.baseline]
    return _COLOURS[(place - (place > baseline)) % len(_COLOURS)]


def marker_of(comparison: Comparison, label: str) -> str:
    """Return a method's marker, the same in all figures."""
    return [*_MARKERS][place_of(comparison, label) % len(_MARKERS)]


def glyph_of(comparison: Comparison, label: str) -> str:
    """Return a method's marker as text."""
    return _MARKERS[marker_of(comparison, label)]


def folded(label: str, width: int) -> str:
    """Return a label in lines of at most `width` characters, broken at its own separators."""
    lines, line = [], ""
    for piece in re.findall(r"@?[^-_@]*[-_]?", label):
        if line and len(line + piece) > width:
            lines.append(line)
            line = ""
        line += piece
    return "\n".join([*lines, line])


def short_count(value: float) -> str:
    """Return a count with k, M or G, for axes."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def short_bytes(value: float) -> str:
    """Return an amount of memory with three digits."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Inches of one frame: the drawn height and the room for tick labels left and below."""

    height: float
    left: float = 0.38
    below: float = 0.24
    legend: bool = False
    """Presence of a line below the heading that names colours."""


def panels(comparison: Comparison, labels: Sequence[str], frame: Frame, what: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one frame per method label, titled, and its axes.

    Every frame has its own tick labels and moves as a whole.

    Args:
        comparison: gives each method its place.
        labels: those of the methods shown, in order.
        frame: size of a frame.
        what: the axes in words, written once above all frames.
    """
    titles = [folded(clean(label), 27) for label in labels]
    title = _LINE * max(text.count("\n") + 1 for text in titles) + 0.1
    columns = min(COLUMNS, len(labels))
    head = _HEAD + (_LINE if frame.legend else 0)
    step = title + frame.height + frame.below
    width, height = PITCH * max(2, columns), head + step * -(-len(labels) // columns)
    figure = Figure(figsize=(width, height))
    figure.text(0.0, 1 - 0.05 / height, what, fontsize=7, va="top")
    axes_list = []
    for index, (label, text) in enumerate(zip(labels, titles, strict=True)):
        row, column = divmod(index, columns)
        bottom = height - head - row * step - title - frame.height
        axes = figure.add_axes(
            (
                (column * PITCH + frame.left) / width,
                bottom / height,
                (PITCH - frame.left - 0.1) / width,
                frame.height / height,
            )
        )
        edge = (0.06 - frame.left) / (PITCH - frame.left - 0.1)  # of the frame, in axes' widths
        axes.set_title(text, fontsize=6.5, loc="left", x=edge, y=1.0, pad=3)
        axes.tick_params(labelsize=6)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_coords(0, 0)  # no label: its place need not be measured
        mark(axes, place_of(comparison, label))
        axes_list.append(axes)
    places = [place_of(comparison, label) for label in labels]
    mark_layout(figure, places, columns=columns, step=(PITCH, step), head=head)
    return figure, axes_list


def plot_marked(axes: Axes, place: int, texts: Sequence[str], *args: Any, **look: Any) -> None:
    """Plot as `Axes.plot` does, and say which method that belongs to and what to show on hover."""
    (line,) = axes.plot(*args, **look)
    mark(line, place, texts)


def heat_map(
    axes: Axes, values: FloatArray, place: int | None, texts: Sequence[str], colours: str, limits: tuple[float, float]
) -> None:
    """Colour cells by value, NaN left blank; each says its text on hover, without texts they are a picture."""
    axes.grid(False)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=mpl.colormaps[colours],
        vmin=limits[0],
        vmax=limits[1],
        edgecolors=PAPER,
        linewidth=0.6,
    )
    mesh.set_rasterized(not texts)
    mark(mesh, place, texts)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)


def write_cells(
    axes: Axes, values: FloatArray, number: Callable[[float], str], *, light: Callable[[float], bool], size: float
) -> None:
    """Write numbers into the cells of a heat map, in white where `light` says so, and a dash for NaN."""
    for (row, column), value in np.ndenumerate(values):
        absent = bool(np.isnan(value))
        text = "\N{EN DASH}" if absent else number(float(value))
        colour = MUTED if absent else "#ffffff" if light(float(value)) else "#101418"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def share_limits(axes_list: Sequence[Axes], low: float, high: float) -> None:
    """Give all frames one vertical scale with a little room at both ends."""
    room = 0.06 * (high - low) or 0.01
    for axes in axes_list:
        axes.set_ylim(low - room, high + room)
