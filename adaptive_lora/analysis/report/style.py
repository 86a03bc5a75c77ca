"""One look for all figures: sizes and colours.

Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart; marker and
label say the same. Ink and paper are replaced by the page's own, so figures follow its dark mode.
"""

from __future__ import annotations

import re
from typing import Any, Final

from matplotlib.typing import RcKeyType

from adaptive_lora.analysis.comparison import Comparison

WIDTH = 4.7
"""Inches of a figure with all methods in one frame: legible at the width of a phone."""
INK, MUTED, LINE, PAPER = "#1b1c1f", "#6a6d75", "#d5d8de", "#fffffe"
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
ROLE_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#6a6d75")
"""Of the parts of a layer, in the order in which data flow."""
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
"""Matplotlib's name of a marker -> the sign that stands for it in text."""
STYLE: Final[dict[RcKeyType, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptive-lora",
    "pdf.fonttype": 42,  # TrueType: text in papers stays text
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def place_of(comparison: Comparison, label: str) -> int:
    """Return a method's place in the comparison, by which the page finds what is its own."""
    return [m.label for m in comparison.methods].index(label)


def colour_of(comparison: Comparison, label: str) -> str:
    """Return a method's colour, the same in all figures; the baseline is grey."""
    if label == comparison.baseline:
        return MUTED
    others = [m.label for m in comparison.methods if m.label != comparison.baseline]
    return _COLOURS[others.index(label) % len(_COLOURS)]


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
