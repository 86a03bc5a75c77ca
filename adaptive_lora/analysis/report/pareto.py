"""Test loss against what a method costs, and the front of both."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adaptive_lora.analysis.comparison import Comparison, Cost, ParetoFront, ParetoPoint
from adaptive_lora.analysis.comparison.types import MATCHED_SHARE
from adaptive_lora.analysis.comparison.wording import count, plain
from adaptive_lora.analysis.report.style import MUTED, WIDTH, colour_of, marker_of, place_of, short_bytes, short_count
from adaptive_lora.analysis.report.svg import clean, mark

LABELS: Mapping[Cost, str] = {
    Cost.TRAINED: "parameters trained",
    Cost.SERVED: "parameters served",
    Cost.TIME: "training time (s)",
    Cost.MEMORY: "peak memory",
}


def pareto(comparison: Comparison, cost: Cost) -> Figure | None:
    """Draw mean test loss with its interval over a cost, and the front of both.

    None where the cost was not recorded, where all methods cost the same, and for trained
    parameters that are those served.
    """
    fronts = {front.cost: front for front in comparison.fronts}
    front = fronts.get(cost)
    if front is None or (cost is Cost.TRAINED and _same(front, fronts.get(Cost.SERVED))):
        return None
    costs = [point.cost for point in front.points]
    if max(costs) - min(costs) < MATCHED_SHARE * max(costs):
        return None
    columns = 2 if len(front.points) > 8 else 1
    rows = -(-len(front.points) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 + 0.16 * rows), layout="constrained")
    axes = figure.subplots()
    points = sorted(front.points, key=lambda point: place_of(comparison, point.method))
    for point in points:
        _point(axes, comparison, point, front)
    best = [(point.cost, point.loss) for point in front.points if point.on_front]
    axes.plot(*zip(*best, strict=True), ":", drawstyle="steps-post", color=MUTED, linewidth=1, zorder=0)
    short = short_bytes if cost is Cost.MEMORY else short_count
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08)
    axes.set_xlabel(LABELS[cost])
    axes.set_ylabel(f"test loss ({comparison.unit})")
    legend = figure.legend(loc="outside lower left", ncols=columns, fontsize=6 if columns > 1 else 7.5, columnspacing=1)
    for point, *parts in zip(points, legend.legend_handles, legend.get_texts(), strict=True):
        for part in parts:
            if part is not None:
                mark(part, place_of(comparison, point.method))
    return figure


def _same(trained: ParetoFront, served: ParetoFront | None) -> bool:
    if served is None:
        return False
    return {p.method: p.cost for p in trained.points} == {p.method: p.cost for p in served.points}


def _point(axes: Axes, comparison: Comparison, point: ParetoPoint, front: ParetoFront) -> None:
    interval = comparison.method(point.method).loss_interval
    place, colour = place_of(comparison, point.method), colour_of(comparison, point.method)
    text = f"{point.method}: test loss {plain(point.loss)}"
    if interval.low is not None and interval.high is not None:
        bar = axes.vlines(point.cost, interval.low, interval.high, color=colour, linewidth=1.4)
        mark(bar, place)
        text += f" ({plain(interval.low)} to {plain(interval.high)})"
    (dot,) = axes.plot(
        [point.cost],
        [point.loss],
        marker_of(comparison, point.method),
        color=colour,
        markersize=6,
        label=clean(point.method),
    )
    text += f", {cost_text(point.cost, front.cost)}"
    if point.on_front:
        text += ", on the front"
    if point.front_share is not None:
        text += f"; on it in {100 * point.front_share:.0f} % of draws of seeds"
    mark(dot, place, [text])


def cost_text(value: float, cost: Cost) -> str:
    """Return a cost with its unit."""
    if cost is Cost.MEMORY:
        return short_bytes(value)
    if cost is Cost.TIME:
        return f"{value:,.1f} s"
    return f"{count(value)} parameters"
