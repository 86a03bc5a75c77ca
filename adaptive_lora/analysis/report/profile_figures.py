"""Figures of an importance profile: scores per site, and the worth of each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from adaptive_lora.allocation.site import AdapterSite

UNITS = {
    "whitened_gradient": "loss gain [nats per token]",
    "gradient_norm": "squared singular value",
    "activation_spectrum": "explained share of variance",
}
"""Metric -> quantity and unit of its spectrum."""


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
