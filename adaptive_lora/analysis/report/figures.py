"""All figures of a comparison: inline SVG for the page; SVG, PNG and PDF files for papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison, Cost
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import confidence_text, interval_methods
from adaptive_lora.analysis.report.loss_figures import (
    differences,
    example_changes,
    learning_rates,
    pareto,
    validation_curves,
)
from adaptive_lora.analysis.report.rank_figures import budgets, method_agreement, rank_maps, seed_agreement
from adaptive_lora.analysis.report.style import STYLE
from adaptive_lora.analysis.report.svg import to_svg
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.results import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One figure with its text; in `_FIGURES` the caption has places to be filled in, and no SVG is drawn."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    wide: bool = False
    """Width on the page: all of it if true, else one column."""
    more: bool = False
    """Place on the page: with the further statistics if true, else with the answer."""
    svg: str = ""
    """Inline SVG whose text and lines take the page's colours."""


_Draw = Callable[[Comparison, Sequence[TrialRecord], Mapping[str, str]], Figure | None]
"""Draws a figure from a comparison, its trials, and example id -> text; None where data are missing."""
_FRONT = (
    "Mean and {confidence} interval over seeds{loss methods}; down and left is better. The dotted "
    "line is the front: the loss that the methods that no other beats in both reach at that cost."
)
_FIGURES: Mapping[Drawing, _Draw] = {
    Drawing(
        name="differences",
        title="Paired differences to the baseline",
        caption="Test loss, method minus {baseline}: each dot one seed, bar the {confidence} "
        "interval of the mean{difference methods}. Left of zero is better.{margin}",
    ): lambda c, _, __: differences(c),
    Drawing(
        name="loss_against_served_parameters",
        title="Test loss against parameters served",
        caption=_FRONT + " These intervals hold what all methods share within a seed, so judge by "
        "the paired differences.",
    ): lambda c, _, __: pareto(c, Cost.SERVED),
    Drawing(
        name="loss_against_trained_parameters",
        title="Test loss against parameters trained",
        caption=_FRONT + " Drawn because a method trains more parameters than it serves.",
        more=True,
    ): lambda c, _, __: pareto(c, Cost.TRAINED),
    Drawing(
        name="loss_against_training_time",
        title="Test loss against training time",
        caption=_FRONT + " {note time}",
        more=True,
    ): lambda c, _, __: pareto(c, Cost.TIME),
    Drawing(
        name="loss_against_peak_memory",
        title="Test loss against peak memory",
        caption=_FRONT + " {note memory}",
        more=True,
    ): lambda c, _, __: pareto(c, Cost.MEMORY),
    Drawing(
        name="rank_maps",
        title="Where the ranks went",
        caption="Rank per layer (0 at the input) and role, mean over seeds; a dash: no adapter there.",
        wide=True,
    ): lambda c, records, _: rank_maps(c, records),
    Drawing(
        name="budgets",
        title="Where the parameters went",
        caption="Share of a method's parameters in each layer (0 at the input), mean over seeds. A rank costs as "
        "many parameters as a linear layer has inputs and outputs, so equal ranks are not equal shares.",
        wide=True,
    ): lambda c, _, __: budgets(c),
    Drawing(
        name="seed_agreement",
        title="Do seeds agree on the ranks?",
        caption="Spearman correlation of the ranks of all sites between seeds, for methods whose ranks depend on "
        "the seed: +1 the same order, 0 none. A measure that orders sites by chance cannot help.",
        wide=True,
        more=True,
    ): lambda c, _, __: seed_agreement(c),
    Drawing(
        name="method_agreement",
        title="Do methods agree on the ranks?",
        caption="Spearman correlation of mean ranks over all sites; a dash: one of them gives all sites the same rank.",
        more=True,
    ): lambda c, _, __: method_agreement(c),
    Drawing(
        name="validation_curves",
        title="Validation loss while training",
        caption="At the chosen rate; mean over seeds, band from lowest to highest seed, {baseline} in grey. The "
        "loss before training may lie above the frame.",
        wide=True,
    ): lambda c, records, _: validation_curves(c, records),
    Drawing(
        name="learning_rates",
        title="Validation loss against learning rate",
        caption="Mean over seeds and standard deviation; the ring is the chosen rate. A ring at the edge means that "
        "a better rate may lie outside.",
        wide=True,
    ): lambda c, _, __: learning_rates(c),
    Drawing(
        name="example_changes",
        title="Which test examples changed",
        caption="Loss of every test example minus the baseline's, summed over the response, averaged over seeds, "
        "and sorted. Below zero is better. Dots are the most changed examples, whose texts are below.",
        wide=True,
    ): example_changes,
}


def _in_brackets(intervals: Iterable[Interval]) -> str:
    methods = interval_methods(intervals)
    return f" ({methods})" if methods else ""


def _margin_band(comparison: Comparison) -> str:
    if comparison.margin.value is None:
        return ""
    level = confidence_text(one_sided(comparison.confidence))
    return (
        f" The band is the equivalence margin; the thick part of the bar is the {level} interval, "
        "which lies within it where a method is equivalent."
    )


def draw_all(
    comparison: Comparison, records: Sequence[TrialRecord], examples: Mapping[str, str], folder: Path
) -> tuple[Drawing, ...]:
    """Draw every figure that the data allow and save each as SVG, PNG and PDF in a folder.

    Files hold no dates: the same comparison gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        "baseline": comparison.baseline,
        "confidence": confidence_text(comparison.confidence),
        "difference methods": _in_brackets(
            m.difference.interval for m in comparison.methods if m.difference is not None
        ),
        "loss methods": _in_brackets(m.loss_interval for m in comparison.methods),
        "margin": _margin_band(comparison),
        "note time": "",
        "note memory": "",
    }
    for front in comparison.fronts:
        words |= {f"note {front.cost.split()[-1]}": front.note}
    drawings = []
    for drawing, draw in _FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = draw(comparison, records, examples)
            if figure is not None:
                svg = _save(figure, folder / drawing.name, drawing.title)
                drawings.append(replace(drawing, caption=drawing.caption.format(**words).strip(), svg=svg))
    return tuple(drawings)


def _save(figure: Figure, path: Path, title: str) -> str:
    """Save a figure in every format and return its inline SVG."""
    if figure.get_layout_engine() is not None:  # lay out once, not once a format
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    figure.savefig(path.with_suffix(".png"), dpi=200, facecolor="white", pil_kwargs={"compress_level": 3})
    figure.savefig(path.with_suffix(".pdf"), metadata={"Title": title, "CreationDate": None}, facecolor="white")
    alone, inline = to_svg(figure, path.name)
    path.with_suffix(".svg").write_text(alone, encoding="utf-8", newline="\n")
    return inline
