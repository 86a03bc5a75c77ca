"""Where the ranks went: layers x roles as one heat map per method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.grid import Frame, panels
from adaptive_lora.analysis.report.selection import used_trials
from adaptive_lora.analysis.report.style import MUTED, PAPER, place_of
from adaptive_lora.analysis.report.svg import mark
from adaptive_lora.results import FloatArray, TrialRecord

ROLE_ORDER = ("query", "key", "value", "qkv", "output", "up", "gate", "down", "other")
_MOST_NUMBERS = 600
"""Cells in all frames up to which ranks are written in; beyond, colour and hover tell them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Map:
    """The ranks of one method."""

    ranks: Mapping[tuple[int, str], Sequence[float]]
    """Layer and role -> the rank of every site there, in every trial."""
    layers: Sequence[int]
    roles: Sequence[str]
    highest: float
    """Highest mean rank of a cell over all methods: the same colour everywhere."""

    @property
    def mean_LR(self) -> FloatArray:
        """Mean rank per layer (L) and role (R); NaN where the method has no adapter."""
        return np.array(
            [[np.mean(self.ranks.get((layer, role), [np.nan])) for role in self.roles] for layer in self.layers]
        )


def rank_maps(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw layers x roles per method as a heat map, with the ranks written in where few."""
    maps = {
        label: _ranks(trials)
        for label, trials in used_trials(comparison, records).items()
        if any(trial.plan.get("sites") for trial in trials)
    }
    if not maps:
        return None
    cells = {cell for ranks in maps.values() for cell in ranks}
    layers = sorted({layer for layer, _ in cells})
    roles = ordered_roles({role for _, role in cells})
    highest = max(np.mean(values) for ranks in maps.values() for values in ranks.values())
    row = min(0.15, 4.0 / len(layers))
    written = len(maps) * len(layers) * len(roles) <= _MOST_NUMBERS and row > 0.12
    wide = len(roles) > 4
    frame = Frame(height=row * len(layers), left=0.24, below=0.42 if wide else 0.24)
    what = "rank by layer (0 at the input) and role"
    if not written:
        what += f"; white is 0, darkest is {highest:.3g}"
    figure, frames = panels(comparison, list(maps), frame, what)
    ticks = slice(None, None, 1 if row > 0.12 else 4)
    for axes, (label, ranks) in zip(frames, maps.items(), strict=True):
        values = _Map(ranks=ranks, layers=layers, roles=roles, highest=float(highest))
        _heat_map(axes, values, place_of(comparison, label), label)
        if written:
            _write(axes, values)
        axes.set_xticks(np.arange(len(roles)) + 0.5, roles, rotation=60 if wide else 0)
        axes.set_yticks((np.arange(len(layers)) + 0.5)[ticks], [str(one) for one in layers[ticks]])
        axes.tick_params(length=0, pad=2)
    return figure


def ordered_roles(found: set[str]) -> list[str]:
    """Return roles in the order in which data flow through a layer, unknown ones last."""
    roles = [role for role in ROLE_ORDER if role in found]
    return roles + sorted(found - set(roles))


def _heat_map(axes: Axes, values: _Map, place: int, label: str) -> None:
    """Colour cells by mean rank; each says its rank, and the range over seeds, on hover."""
    axes.grid(False)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values.mean_LR),
        cmap=mpl.colormaps["Blues"],
        vmin=0,
        vmax=1.1 * values.highest,
        edgecolors=PAPER,
        linewidth=0.6,
    )
    mark(
        mesh,
        place,
        [
            f"{label}, layer {layer}, {role}: {_said(values.ranks.get((layer, role), ()))}"
            for layer in values.layers
            for role in values.roles
        ],
    )
    axes.spines[:].set_visible(False)


def _said(ranks: Sequence[float]) -> str:
    if not ranks:
        return "no adapter"
    text = f"rank {_number(float(np.mean(ranks)))}"
    return text if min(ranks) == max(ranks) else f"{text} ({min(ranks):g} to {max(ranks):g})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.1f}"


def _write(axes: Axes, values: _Map) -> None:
    for (row, column), value in np.ndenumerate(values.mean_LR):
        absent = bool(np.isnan(value))
        text = "\N{EN DASH}" if absent else _number(float(value))
        dark = not absent and value > 0.55 * values.highest
        colour = MUTED if absent else "#ffffff" if dark else "#101418"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=5.5, color=colour)


def _ranks(trials: Sequence[TrialRecord]) -> Mapping[tuple[int, str], list[float]]:
    """Return the ranks per layer and role: of every trial, and every site of the role."""
    ranks: dict[tuple[int, str], list[float]] = defaultdict(list)
    for trial in trials:
        for site in trial.plan.get("sites", ()):
            ranks[int(site["layer"]), str(site["role"])].append(float(site["rank"]))
    return ranks
