"""Figures of other commands than `compare`: importance profiles, and differences in many cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.analysis.report.style import WIDTH
from adaptive_lora.analysis.report.svg import INK, MUTED

UNITS = {
    "whitened_gradient": "loss gain [nats per token]",
    "gradient_norm": "squared singular value",
    "activation_spectrum": "explained share of variance",
}
"""Metric -> quantity and unit of its spectrum."""
_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "open": MUTED}
_MARKS = {"better": "o", "worse": "s", "open": "D"}


def profile_figure(sites: Sequence[AdapterSite], scores: Mapping[str, float], metric: str, folder: Path) -> Path:
    """Draw scores per parameter as bars by layer, one colour a role; return the PNG."""
    roles = list(dict.fromkeys(site.role for site in sites))
    layers = list(dict.fromkeys((site.tower, site.layer) for site in sites))
    width = 0.8 / len(roles)
    figure = Figure(figsize=(max(6.0, 0.45 * len(layers) * len(roles)), 3.6), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"]
    for index, role in enumerate(roles):
        chosen = [site for site in sites if site.role == role]
        axes.bar(
            [layers.index((site.tower, site.layer)) + (index - (len(roles) - 1) / 2) * width for site in chosen],
            [scores[site.name] for site in chosen],
            width,
            label=str(role),
            color=colours(index / max(1, len(roles) - 1) * 0.9),
        )
    axes.set_xticks(range(len(layers)), [f"{tower} {layer}".strip() for tower, layer in layers])
    axes.set(xlabel="layer", ylabel=metric.replace("_", " "), title=f"importance: {metric}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(roles), fontsize="small")
    path = folder / f"profile_{metric}.png"
    figure.savefig(path, dpi=150)
    return path


def spectrum_figure(
    sites: Sequence[AdapterSite], spectra: Mapping[str, Sequence[float]], metric: str, folder: Path
) -> Path:
    """Draw the worth of each rank, one panel a role and one line a layer; return the PNG.

    Components worth nothing, below the noise, are left out: a line ends where they begin.
    """
    roles = list(dict.fromkeys(site.role for site in sites))
    layers = list(dict.fromkeys((site.tower, site.layer) for site in sites))
    columns = min(4, len(roles))
    rows = -(-len(roles) // columns)
    figure = Figure(figsize=(1.2 + 2.4 * columns, 0.8 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    colours = mpl.colormaps["viridis"]
    for axes, role in zip(panels, roles, strict=False):
        for site in sites:
            if site.role == role:
                values = [value for value in spectra[site.name] if value > 0]
                depth = layers.index((site.tower, site.layer)) / max(1, len(layers) - 1)
                axes.plot(range(1, len(values) + 1), values, color=colours(depth), lw=1)
        axes.set_title(str(role), fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels)[len(roles) :]:
        axes.set_visible(False)
    figure.supxlabel("rank", fontsize="medium")
    figure.supylabel(UNITS.get(metric, metric.replace("_", " ")), fontsize="medium")
    figure.suptitle(f"what each rank is worth: {metric}", fontsize="medium")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(1, len(layers) - 1)), colours)
    bar = figure.colorbar(scale, ax=figure.axes, label="layer")
    ticks = range(0, len(layers), -(-len(layers) // 8))
    bar.set_ticks(list(ticks), labels=[f"{layers[i][0]} {layers[i][1]}".strip() for i in ticks])
    path = folder / f"spectrum_{metric}.png"
    figure.savefig(path, dpi=150)
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class ForestRow:
    """One difference to the baseline."""

    label: str
    value: float
    low: float | None
    high: float | None
    tone: str
    """`better`, `worse` or `open`: colour and mark."""


def forest_grid(groups: Mapping[str, Sequence[ForestRow]], axis: str, path: Path) -> None:
    """Draw one frame per group and write PNG and PDF.

    Args:
        groups: title -> rows, in the order in which they are drawn; the same labels in each.
        axis: label of the common horizontal axis.
        path: place of the PNG; the PDF is written beside it.
    """
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    most = max(len(rows) for rows in groups.values())
    figure = Figure(figsize=(WIDTH, 0.5 + lines * (0.45 + 0.19 * most)), layout="constrained")
    grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, (title, rows) in zip(grid, groups.items(), strict=False):
        axes.set_title(title, fontsize=8, loc="left")
        _frame(axes, rows)
    for unused in grid[len(groups) :]:
        unused.set_visible(False)
    grid[0].invert_yaxis()
    figure.supxlabel(axis, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def _frame(axes: Axes, rows: Sequence[ForestRow]) -> None:
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, row in enumerate(rows):
        colour = _COLOURS[row.tone]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=1.6)
        axes.plot(row.value, place, _MARKS[row.tone], color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
