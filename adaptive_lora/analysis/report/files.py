"""The result table for programs and papers: CSV with every digit, and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping

from adaptive_lora.analysis.comparison import Comparison, Difference, MethodSummary
from adaptive_lora.analysis.report.tables import p_decides, result_table

_Reader = Callable[[Comparison, MethodSummary], str | float | int | None]
_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{NO-BREAK SPACE}": "~",
    "\N{BLACK DIAMOND}": r"$\diamond$",
    "\N{BLACK UP-POINTING TRIANGLE}": r"$\uparrow$",
    "\N{BLACK DOWN-POINTING TRIANGLE}": r"$\downarrow$",
    "\N{ALMOST EQUAL TO}": r"$\approx$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{WHITE CIRCLE}": r"$\circ$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _of_difference(read: Callable[[Difference], float | str | None]) -> _Reader:
    return lambda _, m: None if m.difference is None else read(m.difference)


COLUMNS: Mapping[str, _Reader] = {
    "method": lambda c, m: m.label,
    "verdict": lambda c, m: str(m.verdict.kind),
    "difference": _of_difference(lambda d: d.mean),
    "interval_low": _of_difference(lambda d: d.interval.low),
    "interval_high": _of_difference(lambda d: d.interval.high),
    "interval_method": _of_difference(lambda d: d.interval.method),
    "p": _of_difference(lambda d: d.tests.sign_flip),
    "p_corrected": lambda c, m: p_decides(c, m),
    "test_loss": lambda c, m: m.loss.mean,
    "test_loss_sd": lambda c, m: m.loss.sd,
    "test_loss_low": lambda c, m: m.loss_interval.low,
    "test_loss_high": lambda c, m: m.loss_interval.high,
    "perplexity": lambda c, m: m.perplexity.mean,
    "token_accuracy": lambda c, m: m.token_accuracy.mean,
    "exact_match": lambda c, m: m.exact_match.mean,
    "parameters": lambda c, m: m.parameters.mean,
    "parameters_to_baseline": lambda c, m: m.parameters.share,
    "learning_rate": lambda c, m: m.lr,
    "seeds": lambda c, m: len(m.seeds),
    "missing_seeds": lambda c, m: len(m.missing_seeds),
    "failed_trials": lambda c, m: len(m.failures),
}
"""Column -> its value; losses in the comparison's unit, shares as fractions of 1."""


def csv_table(comparison: Comparison) -> str:
    """Return one line per method; a value that does not exist is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for method in comparison.methods:
        values = [read(comparison, method) for read in COLUMNS.values()]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def latex_table(comparison: Comparison) -> str:
    """Return the result table as a `tabular` of the booktabs package, with its note."""
    table = result_table(comparison)
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'r' * (len(table.head) - 2)}}}",
        r"\toprule",
        f"{' & '.join(map(latex, table.head))} \\\\",
        r"\midrule",
        *(f"{' & '.join(latex(cell.text) for cell in row)} \\\\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        f"% {' '.join(table.note.split())}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Return a text that LaTeX sets as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in text.replace("\n", " "))
