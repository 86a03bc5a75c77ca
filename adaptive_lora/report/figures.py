"""All figures of a comparison: inline SVG for the page and PNG files for papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from adaptive_lora.comparison import Comparison
from adaptive_lora.report.panels import learning_rates, rank_maps, validation_curves
from adaptive_lora.report.plots import differences, loss_against_parameters
from adaptive_lora.report.style import STYLE, inline_svg
from adaptive_lora.results import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One figure with its text; `name` is its file name without ending."""

    name: str
    title: str
    caption: str
    svg: str
    """Inline SVG whose text and lines take the page's colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is drawn under which name; `{baseline}` and `{confidence}` are filled in."""

    name: str
    title: str
    caption: str
    make: Callable[[Comparison, Sequence[TrialRecord]], Figure | None]


_PLANS = (
    _Plan(
        name="differences",
        title="Paired differences to the baseline",
        caption="Test loss, method minus {baseline}: each dot one seed, bar the {confidence} "
        "interval of the mean. Left of zero is better. The band is the equivalence margin, where "
        "there is one.",
        make=lambda comparison, _: differences(comparison),
    ),
    _Plan(
        name="loss_against_parameters",
        title="Test loss against parameters",
        caption="Mean and interval over seeds; down and left is better. The dotted line joins "
        "methods that no other beats in both. These intervals hold what all methods share within "
        "a seed, so judge by the paired differences.",
        make=lambda comparison, _: loss_against_parameters(comparison),
    ),
    _Plan(
        name="rank_maps",
        title="Where the ranks went",
        caption="Rank per layer (0 at the input) and role, mean over seeds; a dash: no adapter "
        "there.",
        make=rank_maps,
    ),
    _Plan(
        name="validation_curves",
        title="Validation loss while training",
        caption="At the chosen rate; mean over seeds, band from lowest to highest seed, "
        "{baseline} in grey. The loss before training may lie above the frame.",
        make=validation_curves,
    ),
    _Plan(
        name="learning_rates",
        title="Validation loss against learning rate",
        caption="Mean over seeds and standard deviation; the ring is the chosen rate. A ring at "
        "the edge means that a better rate may lie outside.",
        make=lambda comparison, _: learning_rates(comparison),
    ),
)


def draw_all(
    comparison: Comparison, records: Sequence[TrialRecord], folder: Path
) -> tuple[Drawing, ...]:
    """Draw every figure that the data allow and save each as PNG in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        "baseline": comparison.baseline,
        "confidence": f"{100 * comparison.confidence:g} %",
    }
    drawings = []
    for plan in _PLANS:
        with mpl.rc_context(STYLE):
            figure = plan.make(comparison, records)
            if figure is None:
                continue
            figure.savefig(folder / f"{plan.name}.png", dpi=200, facecolor="white")
            svg = inline_svg(figure, plan.name)
        caption = plan.caption.format(**words)
        drawings.append(Drawing(name=plan.name, title=plan.title, caption=caption, svg=svg))
    return tuple(drawings)
