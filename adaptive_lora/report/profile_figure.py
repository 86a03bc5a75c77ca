"""The figure of an importance profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from adaptive_lora.sites import AdapterSite


def profile_figure(
    sites: Sequence[AdapterSite], scores: Mapping[str, float], metric: str, folder: Path
) -> Path:
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
            [
                layers.index((site.tower, site.layer)) + (index - (len(roles) - 1) / 2) * width
                for site in chosen
            ],
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
