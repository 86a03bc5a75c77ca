"""Where each method's parameters went, by layer and role."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_lora.comparison import Comparison
from adaptive_lora.report.grid import Frame, panels
from adaptive_lora.report.ranks import ordered_roles
from adaptive_lora.report.style import ROLE_COLOURS, place_of
from adaptive_lora.report.svg import mark


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
        layer_L = np.array(one.layers)
        below_L = np.zeros(len(layer_L))
        for role in (role for role in roles if role in one.roles):
            share_L = 100 * np.array([row[one.roles.index(role)] for row in one.shares])
            bars = axes.bar(layer_L, share_L, 0.85, bottom=below_L, color=colours[role])
            below_L += share_L
            for bar, layer, share in zip(bars, one.layers, share_L, strict=True):
                text = f"{one.method}, layer {layer}, {role}: {share:.1f} % of its parameters"
                mark(bar, place, [text])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
    highest = 100 * max(max(one.by_layer) for one in comparison.budgets)
    for axes in frames:
        axes.set_ylim(0, 1.05 * highest)
    return figure


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    """Name the roles in one line below the heading, within the width of two frames."""
    height, at = figure.get_figheight(), 0.0
    for role, colour in colours.items():
        y = 1 - 0.2 / height
        figure.text(
            at / figure.get_figwidth(), y, "\N{BLACK SQUARE}", fontsize=7, color=colour, va="top"
        )
        figure.text((at + 0.1) / figure.get_figwidth(), y, role, fontsize=6.5, va="top")
        at += 0.2 + 0.056 * len(role)
