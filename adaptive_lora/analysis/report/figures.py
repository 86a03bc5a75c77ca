"""All figures of a comparison: inline SVG for the page; SVG, PNG and PDF files for papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from adaptive_lora.analysis.comparison import Comparison, Cost
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import confidence_text, interval_methods
from adaptive_lora.analysis.report import forgetting_figures, loss_figures, planted_figures, rank_figures, tables
from adaptive_lora.analysis.report.style import STYLE, drawn_clause
from adaptive_lora.analysis.report.svg import to_svg
from adaptive_lora.analysis.report.tables import described
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.results import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One figure with its text."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    wide: bool = False
    """Width on the page: all of it if true, else one column."""
    more: bool = False
    """Place on the page: with the further statistics if true, else with the answer."""
    svg: str
    """Inline SVG whose text and lines take the page's colours."""


PLANTED = "planted"
"""File name of the figure of several planted teachers."""
_FIGURES: Mapping[str, Callable[[Comparison, Sequence[TrialRecord], Mapping[str, str]], Figure | None]] = {
    "ladder": lambda c, _, __: loss_figures.ladder(c),
    "recovered": lambda c, _, __: planted_figures.recovered_of(c),
    "differences": lambda c, _, __: loss_figures.differences(c),
    "learned_against_forgotten": lambda c, records, _: forgetting_figures.learned_against_forgotten(c, records),
    "loss_against_served_parameters": lambda c, _, __: loss_figures.pareto(c, Cost.SERVED),
    "loss_against_trained_parameters": lambda c, _, __: loss_figures.pareto(c, Cost.TRAINED),
    "loss_against_training_time": lambda c, _, __: loss_figures.pareto(c, Cost.TIME),
    "loss_against_peak_memory": lambda c, _, __: loss_figures.pareto(c, Cost.MEMORY),
    "rank_maps": lambda c, records, _: rank_figures.rank_maps(c, records),
    "budgets": lambda c, _, __: rank_figures.budgets(c),
    "seed_agreement": lambda c, _, __: rank_figures.seed_agreement(c),
    "method_agreement": lambda c, _, __: rank_figures.method_agreement(c),
    "validation_curves": lambda c, records, _: loss_figures.validation_curves(c, records),
    "learning_rates": lambda c, _, __: loss_figures.learning_rates(c),
    "example_changes": loss_figures.example_changes,
}
"""Name in `figures.yaml` -> draws a comparison, its trials, and example id -> text; None where data are missing."""


def draw_all(
    comparison: Comparison, records: Sequence[TrialRecord], examples: Mapping[str, str], folder: Path
) -> tuple[Drawing, ...]:
    """Draw every figure that the data allow and save each as SVG, PNG and PDF in a folder.

    Files hold no dates: the same comparison gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fillings = _fillings(comparison)
    drawings = []
    for name, about in described("figures.yaml").items():
        with matplotlib.style.context(STYLE):
            figure = _FIGURES[name](comparison, records, examples)
            if figure is not None:
                texts = {key: about[key].format(**fillings).strip() for key in ("title", "caption")}
                svg = _save(figure, folder / name, texts["title"])
                drawings.append(Drawing(name=name, svg=svg, **{**about, **texts}))
    return tuple(drawings)


def draw_cells(cells: Sequence[tuple[str, Comparison]], folder: Path) -> Path | None:
    """Write the figure of several comparisons as PNG, SVG and PDF; return the PNG, None where nothing can be recovered.

    Args:
        cells: title of a comparison, and the comparison.
        folder: folder that is made where missing.
    """
    known = [(title, comparison.headroom) for title, comparison in cells if comparison.headroom is not None]
    with matplotlib.style.context(STYLE):
        figure = planted_figures.recovered(known)
        if figure is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        _save(figure, folder / PLANTED, "Recovered shares of planted ranks")
    return (folder / PLANTED).with_suffix(".png")


def _fillings(comparison: Comparison) -> Mapping[str, str]:
    """Return the words that stand in braces in `figures.yaml`, beside those of tables."""
    level = confidence_text(comparison.confidence)
    loss_methods = _in_brackets(m.loss_interval for m in comparison.methods)
    bound = " The dashed line is the bound: no bar of the champion may reach above it."
    margin = ""
    if comparison.margin.value is not None:
        margin = (
            " The band is the equivalence margin; the thick part of the bar is the "
            f"{confidence_text(one_sided(comparison.confidence))} interval, which lies within it where a method is "
            "equivalent."
        )
    outcome = comparison.outcome
    return {
        **tables.fillings(comparison),
        "Above or below": "Above" if outcome.higher_is_better else "Below",
        "Each example": "Loss of every test example"
        if outcome.is_loss
        else f"{outcome.name[:1].upper()}{outcome.name[1:]} of every test example",
        "summed": "summed over the response, " if outcome.is_loss else "",
        "Side": "Right" if outcome.higher_is_better else "Left",
        "dots": "each dot one seed" if comparison.over == "seed" else "the dot one run",
        "confidence": level,
        "forgetting methods": _in_brackets(
            found.forgotten.interval for m in comparison.methods for found in m.forgetting.values()
        ),
        "difference methods": _in_brackets(
            m.difference.interval for m in comparison.methods if m.difference is not None
        ),
        "front": f"Mean and {level} interval over {comparison.over}s{loss_methods}; "
        f"{'up' if outcome.higher_is_better else 'down'} and left is better. The dotted line is the "
        f"front: the {'loss' if outcome.is_loss else outcome.name} that the methods that no other beats in both reach "
        "at that cost.",
        "drawn": f" Drawn are {clause}." if (clause := drawn_clause(comparison)) else "",
        "named": f" Named are {clause}." if clause else "",
        "bound": bound if any(source.allowed is not None for source in comparison.retained) else "",
        "margin": margin,
        **{str(front.cost): front.note for front in comparison.fronts},
    }


def _in_brackets(intervals: Iterable[Interval]) -> str:
    methods = interval_methods(intervals)
    return f" ({methods})" if methods else ""


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
