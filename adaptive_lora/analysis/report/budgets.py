"""Where each method's parameters went, by layer and role."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.grid import Frame, panels
from adaptive_lora.analysis.report.ranks import ordered_roles
from adaptive_lora.analysis.report.style import ROLE_COLOURS, place_of
from adaptive_lora.analysis.report.svg import mark
from adaptive_lora.results import FloatArray


def budgets(comparison: Comparison) -> Figure | None:
    """Draw one frame per method: share of its parameters per layer, roles stacked."""
    if not comparison.budgets:
        return None
    roles = ordered_roles({role for one in comparison.budgets for role in one.roles})
    colours = {role: ROLE_COLOURS[i % len(ROLE_COLOURS)] for i, role in enumerate(roles)}
    frame = Frame(height=0.95, left=0.3, legend=True)
    figure, frames = panels(
        comparison,
        [one.method for one in comparison.budgets],
        frame,
        "share of the parameters (%) by layer, stacked by role",
    )
    _legend(figure, colours)
    for axes, one in zip(frames, comparison.budgets, strict=True):
        place = place_of(comparison, one.method)
        layer_L = np.array(one.layers, dtype=np.float64)
        below_L = np.zeros_like(layer_L)
        for role in (role for role in roles if role in one.roles):
            share_L = 100 * np.array([row[one.roles.index(role)] for row in one.shares])
            mark(
                axes.add_collection(_bars(layer_L, below_L, share_L, colours[role])),
                place,
                [
                    f"{one.method}, layer {layer}, {role}: {share:.1f} % of its parameters"
                    for layer, share in zip(one.layers, share_L, strict=True)
                ],
            )
            below_L += share_L
        axes.set_xlim(layer_L.min() - 0.6, layer_L.max() + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
    highest = 100 * max(max(one.by_layer) for one in comparison.budgets)
    for axes in frames:
        axes.set_ylim(0, 1.05 * highest)
    return figure


def _bars(at_L: FloatArray, below_L: FloatArray, height_L: FloatArray, colour: str) -> PolyCollection:
    """Return bars as one artist: thousands of single ones take seconds."""
    left, right, top = at_L - 0.43, at_L + 0.43, below_L + height_L
    x_LV = np.stack([left, left, right, right], axis=1)
    y_LV = np.stack([below_L, top, top, below_L], axis=1)
    return PolyCollection(list(np.stack([x_LV, y_LV], axis=2)), facecolors=colour, linewidths=0)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    """Name the roles in one line below the heading, within the width of two frames."""
    height, at = figure.get_figheight(), 0.0
    for role, colour in colours.items():
        y = 1 - 0.2 / height
        figure.text(at / figure.get_figwidth(), y, "\N{BLACK SQUARE}", fontsize=7, color=colour, va="top")
        figure.text((at + 0.1) / figure.get_figwidth(), y, role, fontsize=6.5, va="top")
        at += 0.2 + 0.056 * len(role)
