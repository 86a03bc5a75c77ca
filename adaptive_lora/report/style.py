"""One look for all figures: sizes, colours, and SVG that takes the page's colours.

Drawn 4.7 inches wide, so that text stays legible at the width of a phone. Colours are those of
Okabe and Ito (2008), which colour-blind people can tell apart; marker and label say the same.
"""

from __future__ import annotations

import io
import re
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from adaptive_lora.comparison import Comparison

WIDTH = 4.7
INK, MUTED, LINE = "#1b1c1f", "#6a6d75", "#d5d8de"
_PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_MARKERS = "osD^vPX<>*"
STYLE: Final[dict[RcKeyType, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptive-lora",
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


def inline_svg(figure: Figure, name: str) -> str:
    """Return SVG to stand inside the page: its own ids, the page's colours, no outside names."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    for colour, variable in _PAGE_COLOURS.items():
        body = body.replace(colour, variable)
    return f'<svg {box.group()} aria-hidden="true">{body}'


def colour_of(comparison: Comparison, label: str) -> str:
    """Return a method's colour, the same in all figures; the baseline is grey."""
    if label == comparison.baseline:
        return MUTED
    others = [m.label for m in comparison.methods if m.label != comparison.baseline]
    return _COLOURS[others.index(label) % len(_COLOURS)]


def marker_of(comparison: Comparison, label: str) -> str:
    """Return a method's marker, the same in all figures."""
    labels = [m.label for m in comparison.methods]
    return _MARKERS[labels.index(label) % len(_MARKERS)]
