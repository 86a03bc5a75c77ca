"""The comparison in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from adaptive_lora.analysis.comparison import Comparison, VerdictKind
from adaptive_lora.analysis.report.tables import result_table

_STYLES: Mapping[VerdictKind, str] = {
    VerdictKind.BETTER: "bold green",
    VerdictKind.WORSE: "bold red",
    VerdictKind.EQUIVALENT: "cyan",
    VerdictKind.NON_INFERIOR: "cyan",
    VerdictKind.NOT_COMPARED: "red",
}


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the verdict, what is unfair, and the result table."""
    console.print(Panel(Text(comparison.headline, style="bold"), title="Verdict"))
    if comparison.fairness:
        lines = Text("\n".join(f"! {finding}" for finding in comparison.fairness), style="red")
        console.print(Panel(lines, title="Less than fair", border_style="red"))
    console.print(_result(comparison, narrow=console.width < 140))
    for failure in (failure for method in comparison.methods for failure in method.failures):
        where = f"{failure.method}, seed {failure.seed}, fold {failure.fold}, lr {failure.lr:g}"
        console.print(Text(f"failed: {where}: {failure.reason}", style="red"))
    for note in comparison.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"Champion: {comparison.winner} ({comparison.decision})"))


def _result(comparison: Comparison, *, narrow: bool) -> Table:
    """Return the result table; a narrow one leaves out what the text below says."""
    table = result_table(comparison)
    shown = [0, 1, 2, 3, 5, 6, 7] if narrow else list(range(len(table.head)))
    shown_table = Table(caption=table.note, caption_justify="left", show_lines=narrow)
    for column in shown:
        shown_table.add_column(
            table.head[column],
            justify="left" if column < 2 else "right",
            overflow="fold",
            min_width=20 if column == 0 else None,
        )
    for method, row in zip(comparison.methods, table.rows, strict=True):
        # The deviation is in the report; the difference is what a narrow terminal has room for.
        texts = [row[column].text.split(" ± ")[0] if narrow else row[column].text for column in shown]
        cells = [Text(text) for text in texts]
        cells[1].stylize(_STYLES.get(method.verdict.kind, ""))
        shown_table.add_row(*cells)
    return shown_table
