"""The result of a comparison as one object: verdict, table and report, for scripts and notebooks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from adaptive_lora.analysis.comparison import Comparison
from adaptive_lora.analysis.report.formats import About, render_terminal, table_values, write_report
from adaptive_lora.analysis.report.tables import TextTable, result_table
from adaptive_lora.errors import ConfigError
from adaptive_lora.results import TableRows, TrialRecord

_WIDTH = 120
"""Characters of a line of printed text."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ComparisonTable(TableRows):
    """One row per method, the baseline first; `pandas.DataFrame(table)` is a data frame of it.

    A row holds the columns of the report's `table.csv` with every digit; None: the number does not exist.
    """

    text: TextTable
    """The rows as the report shows them."""

    def __str__(self) -> str:
        """Return the table in aligned columns, with its note."""
        lines = [self.text.head, *(tuple(cell.text for cell in row) for row in self.text.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*texts, *filter(None, [self.text.note])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        row = Markup("<tr>{}</tr>")
        head = row.format(Markup().join(Markup("<th>{}</th>").format(name) for name in self.text.head))
        rows = [row.format(Markup().join(Markup("<td>{}</td>").format(c.text) for c in r)) for r in self.text.rows]
        table = Markup("<table><thead>{}</thead><tbody>{}</tbody></table><p><small>{}</small></p>")
        return str(table.format(head, Markup().join(rows), self.text.note))


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class ComparisonResult:
    """A comparison with the trials that it was made from."""

    comparison: Comparison
    """Every number of the verdict, the tables and the audit."""
    records: tuple[TrialRecord, ...]
    """The trials that were compared."""
    about: About
    """Title and texts of the report."""
    folder: Path
    """Folder that `report` writes to where none is given."""
    tasks: Mapping[str, ComparisonResult] = field(default_factory=dict)
    """Name of a task -> its own comparison, where the outcome is a mean over tasks; p-values are corrected for all."""

    @property
    def verdict(self) -> str:
        """The answer in words, with the remarks that belong to it."""
        return self.comparison.headline

    @property
    def table(self) -> ComparisonTable:
        """The result table: one row per method, the baseline first."""
        return ComparisonTable(values=tuple(table_values(self.comparison)), text=result_table(self.comparison))

    def report(self, folder: str | Path | None = None) -> Path:
        """Write page, Markdown, JSON, CSV, LaTeX, methods paragraph and figures.

        Args:
            folder: made where missing; files of an earlier report are replaced. None: `self.folder`.

        Returns:
            Path of `report.html`.

        Raises:
            ConfigError: the folder is a file.
        """
        place = Path(folder or self.folder)
        if place.is_file():
            raise ConfigError(f"report {place} cannot be a folder: it is a file; required a folder, new or not.")
        return write_report(self.comparison, self.records, place, self.about)

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the report's `comparison.json`."""
        return self.comparison.to_dict()

    def __str__(self) -> str:
        """Return the verdict, what is unfair, and the result table, as the command line prints them."""
        console = Console(file=io.StringIO(), width=_WIDTH)
        with console.capture() as captured:
            render_terminal(self.comparison, console)
        return captured.get()

    def __repr__(self) -> str:
        """Return the verdict; the records would be pages."""
        return f"<{type(self).__name__}: {self.verdict}>"

    def _repr_html_(self) -> str:
        """Return verdict and table for a notebook."""
        unfair = Markup().join(Markup("<li>{}</li>").format(finding) for finding in self.comparison.fairness)
        page = Markup("<p><b>{}</b></p>{}{}")
        listed = Markup("<p>Less than fair:</p><ul>{}</ul>").format(unfair) if unfair else ""
        return str(page.format(self.verdict, listed, Markup(self.table._repr_html_())))
