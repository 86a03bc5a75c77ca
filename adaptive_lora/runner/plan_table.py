"""A plan's table and totals: on a terminal, as text, and in a notebook."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from adaptive_lora.allocation import RankPlan, TunerPlan
from adaptive_lora.allocation.architecture import size
from adaptive_lora.redaction import hide_credentials, printable, shown
from adaptive_lora.results import TableRows

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_lora.runner.plan import PlanReport

_TEXTS = ("trained", "site", "role", "base")
"""Headings of columns that are aligned on the left."""
_TENSORS = ("trained", "shape", "number", "parameters")
"""Headings of the table of a tuner without ranks."""
_LABEL = 11
"""Number of characters of a total's label."""
_FOLDED = 60
"""Number of rows above which a notebook shows the table folded."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PlanTable(TableRows):
    """One row per adapter site, or per kind of trained tensor; `pandas.DataFrame(table)` is a data frame of it.

    A row holds `site`, `layer`, `role`, `tower`, `in_features`, `out_features`, `rank`, `alpha`, `factor`,
    `lr_multiplier` and `parameters`; of a tuner without ranks `trained`, `shape`, `number` and `parameters`.
    """

    title: str
    """Label of the method."""
    head: tuple[str, ...]
    """Headings of the columns that are shown."""
    cells: tuple[tuple[str, ...], ...]
    """Rows as they are shown."""

    def print(self, console: Console) -> None:
        """Print the table."""
        from rich.table import Table

        table = Table(title=shown(self.title), header_style="bold", box=None, pad_edge=False)
        for heading in self.head:
            table.add_column(heading, justify="left" if heading in _TEXTS else "right")
        for row in self.cells:
            table.add_row(*map(shown, row))
        console.print(table)

    def __str__(self) -> str:
        """Return the table in aligned columns."""
        return _captured(self.print)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        sides = ["left" if heading in _TEXTS else "right" for heading in self.head]
        row = Markup("<tr>{}</tr>")

        def line(cells: Sequence[str], cell: str) -> Markup:
            each = Markup(f'<{cell} style="text-align:{{}}">{{}}</{cell}>')
            return row.format(Markup().join(each.format(*both) for both in zip(sides, map(_safe, cells), strict=True)))

        body = Markup().join(line(cells, "td") for cells in self.cells)
        table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(line(self.head, "th"), body)
        if len(self) > _FOLDED:
            table = Markup("<details><summary>{} rows</summary>{}</details>").format(len(self), table)
        return str(table)


def plan_table(report: PlanReport) -> PlanTable:
    """Return the table of a plan's sites, or of its tensors."""
    plan = report.plan
    return _tensors(plan) if isinstance(plan, TunerPlan) else _sites(plan, towers=any(s.tower for s in report.sites))


def _tensors(plan: TunerPlan) -> PlanTable:
    """Return the table of trained tensors; tensors of one name in all blocks share a row."""
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, shape in plan.tensors.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        found.setdefault((pattern, tuple(shape)), []).append(size(shape))
    values = [
        {"trained": pattern, "shape": shape, "number": len(sizes), "parameters": sum(sizes)}
        for (pattern, shape), sizes in found.items()
    ]
    cells = [
        (str(v["trained"]), " x ".join(map(str, shape)), f"{v['number']:,}", f"{v['parameters']:,}")
        for v, (_, shape) in zip(values, found, strict=True)
    ]
    return PlanTable(title=plan.method, values=tuple(values), head=_TENSORS, cells=tuple(cells))


def _sites(plan: RankPlan, *, towers: bool) -> PlanTable:
    """Return the table of sites, showing the tower where the base has several and rates where they differ."""
    rates = bool(plan.lr_multipliers())
    values = tuple(
        {
            "site": entry.site.name,
            "layer": entry.site.layer,
            "role": str(entry.site.role),
            "tower": entry.site.tower,
            "in_features": entry.site.in_features,
            "out_features": entry.site.out_features,
            "rank": entry.rank,
            "alpha": entry.alpha,
            "factor": plan.scale_of(entry),
            "lr_multiplier": entry.lr_multiplier,
            "parameters": entry.parameters,
        }
        for entry in plan.entries
    )
    cells = tuple(
        (
            str(row["site"]),
            f"{row['tower']} {row['layer']}" if towers else str(row["layer"]),
            str(row["role"]),
            f"{row['in_features']:,}",
            f"{row['out_features']:,}",
            str(row["rank"]),
            f"{row['alpha']:g}",
            f"{row['factor']:g}",
            *([f"x{row['lr_multiplier']:.3g}"] if rates else []),
            f"{row['parameters']:,}",
        )
        for row in values
    )
    head = ("site", "layer", "role", "in", "out", "rank", "alpha", "factor", *(["rate"] if rates else []), "parameters")
    return PlanTable(title=plan.method, values=values, head=head, cells=cells)


def totals(report: PlanReport) -> list[tuple[str, str]]:
    """Return the lines below a plan's table: label and text; a line without label continues the one before."""
    from adaptive_lora.training.memory import describe

    plan = report.plan
    trained = f"{plan.trainable_parameters:,}"
    if report.base is None:
        lines = [("trainable", f"{trained} parameters")]
    else:
        share = f"{report.reduction_vs_full:.2%} fewer than full fine-tuning"
        lines = [("trainable", f"{trained} of {report.total_parameters:,} parameters: {share}")]
    kind = "linear layers" if report.architecture.experts else "sites"  # a rank of all experts would be another unit
    lines.append(("as much as", f"uniform rank {report.uniform_rank:.2f} on all {len(report.sites)} {kind}"))
    if report.memory is not None and report.load is not None:
        lines.append(("memory", describe(report.memory, report.load)))
    lines += [("" if number else "engine", text) for number, text in enumerate(report.engine)]
    if plan.budget is not None:
        left = plan.budget - plan.trainable_parameters
        used = f"of which {left:,} unused" if left >= 0 else f"exceeded by {-left:,}"
        lines.append(("budget", f"{plan.budget:,}, {used}"))
    if isinstance(plan, TunerPlan):
        return lines
    lines.append(("scaling", f"{plan.scaling}: factor {plan.scaling.formula}"))
    if plan.scaling_in_training:
        lines.append(("", plan.scaling_in_training))
    if plan.left_out:
        lines.append(("left out", f"{', '.join(plan.left_out)} (rank 0)"))
    facts = [] if plan.certificate is None else plan.certificate.sentences()
    return [*lines, *((fact[:_LABEL].rstrip(), fact[_LABEL:]) for fact in facts)]


def print_plan(report: PlanReport, console: Console) -> None:
    """Print a plan's table, remarks and totals."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    report.table.print(console)
    if report.note is not None:
        say(f"\n[yellow]note[/]       {shown(report.note)}")
    say("")
    for label, text in totals(report):
        say(f"{label:<{_LABEL}}{shown(text)}")
    if len(report.engine) > 1:
        say("")
        report.gpus.print(console)


def as_text(report: PlanReport) -> str:
    """Return what `print_plan` prints, without colours."""
    return _captured(lambda console: print_plan(report, console))


def as_html(report: PlanReport) -> str:
    """Return a plan's table, remarks and totals for a notebook."""
    line = Markup('<tr><th style="text-align:left;white-space:nowrap">{}</th><td style="text-align:left">{}</td></tr>')
    notes = [] if report.note is None else [("note", report.note)]
    rows = Markup().join(line.format(label, _safe(text)) for label, text in [*notes, *totals(report)])
    page = Markup("<b>{}</b>{}<table><tbody>{}</tbody></table>{}")
    gpus = Markup(report.gpus._repr_html_() if len(report.engine) > 1 else "")
    return str(page.format(_safe(report.plan.method), Markup(report.table._repr_html_()), rows, gpus))


def _safe(text: str) -> str:
    return printable(hide_credentials(text))


def _captured(write: Callable[[Console], None]) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    with console.capture() as captured:
        write(console)
    return captured.get()
