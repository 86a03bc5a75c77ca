"""Small multiples: one frame per method, all of one size, so that the page can rearrange them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.style import folded, place_of
from adaptive_lora.analysis.report.svg import clean, mark, mark_layout

COLUMNS, PITCH = 4, 1.65
"""Frames beside each other in a paper, and inches from one to the next."""
_HEAD, _LINE = 0.24, 0.125
"""Inches of the line that says what is drawn, and of one line of a frame's title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Inches of one frame: the drawn height and the room for tick labels left and below."""

    height: float
    left: float = 0.38
    below: float = 0.24
    legend: bool = False
    """Whether a line below the heading names colours."""


def panels(comparison: Comparison, labels: Sequence[str], frame: Frame, what: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one frame per method label, titled, and its axes.

    Every frame has its own tick labels and moves as a whole.

    Args:
        comparison: which method stands where.
        labels: of the methods shown, in order.
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
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_coords(0, 0)  # no label: its place need not be measured
        mark(axes, place_of(comparison, label))
        axes_list.append(axes)
    places = [place_of(comparison, label) for label in labels]
    mark_layout(figure, places, columns=columns, step=(PITCH, step), head=head)
    return figure, axes_list


def share_limits(axes_list: Sequence[Axes], low: float, high: float) -> None:
    """Give all frames one vertical scale with a little room at both ends."""
    room = 0.06 * (high - low) or 0.01
    for axes in axes_list:
        axes.set_ylim(low - room, high + room)
