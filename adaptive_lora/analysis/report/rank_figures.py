"""Figures of ranks: where ranks and parameters went, and whether allocations agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_lora.analysis.comparison import Agreement, AgreementKind, Comparison
from adaptive_lora.analysis.comparison.pairing import used_trials
from adaptive_lora.analysis.comparison.wording import MINUS, signed
from adaptive_lora.analysis.report.style import (
    MOST_PARTS,
    ROLE_COLOURS,
    WIDTH,
    Frame,
    drawn,
    folded,
    heat_map,
    panels,
    place_of,
    write_cells,
)
from adaptive_lora.analysis.report.svg import clean, mark
from adaptive_lora.results import FloatArray, TrialRecord

ROLE_ORDER = ("query", "key", "value", "qkv", "output", "up", "gate", "down", "other")
_MOST_NUMBERS = 600
"""Cells in all frames up to which ranks are written in; beyond, colour and hover tell them."""
_WRITTEN = 7
"""Labels up to which the numbers are written in."""


def rank_maps(comparison: Comparison, records: Sequence[TrialRecord]) -> Figure | None:
    """Draw layers x roles per method as a heat map, with the ranks written in where few."""
    used = used_trials(comparison, records)
    maps = {
        label: _ranks(trials)
        for label, trials in ((label, used[label]) for label in drawn(comparison))
        if any(trial.plan.get("sites") for trial in trials)
    }
    if not maps:
        return None
    cells = {cell for ranks in maps.values() for cell in ranks}
    layers = sorted({layer for layer, _ in cells})
    roles = ordered_roles({role for _, role in cells})
    highest = float(max(np.mean(values) for ranks in maps.values() for values in ranks.values()))
    row = min(0.15, 4.0 / len(layers))
    parts = len(maps) * len(layers) * len(roles)
    written = parts <= _MOST_NUMBERS and row > 0.12
    wide = len(roles) > 4
    frame = Frame(height=row * len(layers), left=0.24, below=0.42 if wide else 0.24)
    what = "rank by layer (0 at the input) and role"
    if not written:
        what += f"; white is 0, darkest is {highest:.3g}"
    figure, frames = panels(comparison, list(maps), frame, what)
    ticks = slice(None, None, 1 if row > 0.12 else 4)
    for axes, (label, ranks) in zip(frames, maps.items(), strict=True):
        mean_LR = np.array([[np.mean(ranks.get((layer, role), [np.nan])) for role in roles] for layer in layers])
        texts = [
            f"{label}, layer {layer}, {role}: {_said(ranks.get((layer, role), ()))}"
            for layer in layers
            for role in roles
            if parts <= MOST_PARTS
        ]
        heat_map(axes, mean_LR, place_of(comparison, label), texts, "Blues", (0, 1.1 * highest))
        if written:
            write_cells(axes, mean_LR, _number, light=lambda rank: rank > 0.55 * highest, size=5.5)
        axes.set_xticks(np.arange(len(roles)) + 0.5, roles, rotation=60 if wide else 0)
        axes.set_yticks((np.arange(len(layers)) + 0.5)[ticks], [str(one) for one in layers[ticks]])
    return figure


def ordered_roles(found: set[str]) -> list[str]:
    """Return roles in the order in which data flow through a layer, unknown ones last."""
    roles = [role for role in ROLE_ORDER if role in found]
    return roles + sorted(found - set(roles))


def _said(ranks: Sequence[float]) -> str:
    if not ranks:
        return "no adapter"
    text = f"rank {_number(float(np.mean(ranks)))}"
    return text if min(ranks) == max(ranks) else f"{text} ({min(ranks):g} to {max(ranks):g})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.1f}"


def _ranks(trials: Sequence[TrialRecord]) -> Mapping[tuple[int, str], list[float]]:
    """Return the ranks per layer and role: of every trial, and every site of the role."""
    ranks: dict[tuple[int, str], list[float]] = defaultdict(list)
    for trial in trials:
        for site in trial.plan.get("sites", ()):
            ranks[int(site["layer"]), str(site["role"])].append(float(site["rank"]))
    return ranks


def budgets(comparison: Comparison) -> Figure | None:
    """Draw one frame per method: share of its parameters per layer, roles stacked."""
    methods = drawn(comparison)
    shown = [one for one in comparison.budgets if one.method in methods]
    if not shown:
        return None
    roles = ordered_roles({role for one in shown for role in one.roles})
    many = sum(len(one.layers) * len(one.roles) for one in shown) > MOST_PARTS
    colours = {role: ROLE_COLOURS[i % len(ROLE_COLOURS)] for i, role in enumerate(roles)}
    frame = Frame(height=0.95, left=0.3, legend=True)
    what = "share of the parameters (%) by layer, stacked by role"
    figure, frames = panels(comparison, [one.method for one in shown], frame, what)
    width, height, at = *figure.get_size_inches(), 0.0
    for role, colour in colours.items():  # named in one line below the heading
        figure.text(at / width, 1 - 0.2 / height, "\N{BLACK SQUARE}", fontsize=7, color=colour, va="top")
        figure.text((at + 0.1) / width, 1 - 0.2 / height, role, fontsize=6.5, va="top")
        at += 0.2 + 0.056 * len(role)
    highest = 100 * max(max(one.by_layer) for one in shown)
    for axes, one in zip(frames, shown, strict=True):
        layer_L, below_L = np.array(one.layers, dtype=np.float64), np.zeros(len(one.layers))
        for role in (role for role in roles if role in one.roles):
            share_L = 100 * np.array([row[one.roles.index(role)] for row in one.shares])
            texts = [
                f"{one.method}, layer {layer}, {role}: {share:.1f} % of its parameters"
                for layer, share in zip(one.layers, share_L, strict=True)
            ]
            bars = axes.add_collection(_bars(layer_L, below_L, share_L, colours[role]))
            bars.set_rasterized(many)
            mark(bars, place_of(comparison, one.method), texts)
            below_L += share_L
        axes.set_xlim(layer_L.min() - 0.6, layer_L.max() + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.05 * highest)
    return figure


def _bars(at_L: FloatArray, below_L: FloatArray, height_L: FloatArray, colour: str) -> PolyCollection:
    """Return bars as one artist: thousands of single ones take seconds."""
    left, right, top = at_L - 0.43, at_L + 0.43, below_L + height_L
    x_LV = np.stack([left, left, right, right], axis=1)
    y_LV = np.stack([below_L, top, top, below_L], axis=1)
    return PolyCollection(list(np.stack([x_LV, y_LV], axis=2)), facecolors=colour, linewidths=0)


def seed_agreement(comparison: Comparison) -> Figure | None:
    """Draw one matrix of seeds x seeds per method whose ranks differ between seeds."""
    methods = drawn(comparison)
    found = [one for one in _of(comparison, AgreementKind.SEEDS) if one.about in methods]
    if not found:
        return None
    many = sum(len(one.labels) ** 2 for one in found) > MOST_PARTS
    frame = Frame(height=1.2, left=0.24, below=0.36)
    folds = any(" fold " in label for one in found for label in one.labels)
    what = f"correlation of ranks between seeds{' (seed/fold)' if folds else ''}"
    figure, frames = panels(comparison, [one.about for one in found], frame, what)
    for axes, one in zip(frames, found, strict=True):
        short = [label.removeprefix("seed ").replace(" fold ", "/") for label in one.labels]
        ticks = slice(None, None, -(-len(short) // 10))
        _matrix(axes, one, place_of(comparison, one.about), size=5.0, hover=not many)
        places = np.arange(len(short)) + 0.5
        axes.set_xticks(places[ticks], short[ticks])
        axes.set_yticks(places[ticks], short[ticks])
        if one.mean is not None:
            mean = f"mean {signed(one.mean, 2)}" + (f" of all {one.allocations}" if _cut(one) else "")
            axes.text(0.5, -0.14, mean, fontsize=6, transform=axes.transAxes, ha="center", va="top")
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
        if _cut(one):
            about += f", the first {len(one.labels)} of {one.allocations}"
        axes.set_title(f"between {one.kind}{about}", fontsize=7, loc="left", y=1.0, pad=3)
    return figure


def _of(comparison: Comparison, kind: AgreementKind) -> Sequence[Agreement]:
    return [one for one in comparison.agreements if one.kind is kind]


def _cut(one: Agreement) -> bool:
    """Return whether some allocations are not in the matrix."""
    return one.allocations > len(one.labels)


def _matrix(axes: Axes, one: Agreement, place: int | None, size: float, *, hover: bool = True) -> None:
    """Draw correlations from -1 to 1, first label on top; every cell says its number."""
    values = np.array(one.matrix, dtype=np.float64)
    texts = [
        f"{one.about}{': ' if one.about else ''}{first} and {second}: "
        + ("nothing is ordered" if value is None else signed(value, 2))
        for first, row in zip(one.labels, one.matrix, strict=True)
        for second, value in zip(one.labels, row, strict=True)
        if hover
    ]
    heat_map(axes, values, place, texts, "PuOr_r", (-1, 1))  # told apart by colour-blind people
    axes.invert_yaxis()
    if len(one.labels) <= _WRITTEN:
        write_cells(
            axes,
            values,
            lambda value: f"{value:z.1f}".replace("-", MINUS),
            light=lambda value: abs(value) > 0.7,
            size=size,
        )
