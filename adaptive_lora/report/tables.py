"""The tables of a comparison, made once as text and shown in terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from adaptive_lora.comparison import Comparison, MethodSummary, VerdictKind
from adaptive_lora.comparison.wording import (
    ABSENT,
    bytes_text,
    count,
    interval_text,
    p_text,
    percent,
    plain,
    signed,
    spread_text,
)

SYMBOLS: Mapping[VerdictKind, str] = {
    VerdictKind.BASELINE: "\N{BLACK DIAMOND}",
    VerdictKind.BETTER: "\N{BLACK UP-POINTING TRIANGLE}",
    VerdictKind.WORSE: "\N{BLACK DOWN-POINTING TRIANGLE}",
    VerdictKind.EQUIVALENT: "\N{ALMOST EQUAL TO}",
    VerdictKind.NON_INFERIOR: "\N{GREATER-THAN OR EQUAL TO}",
    VerdictKind.INCONCLUSIVE: "\N{WHITE CIRCLE}",
    VerdictKind.NOT_COMPARED: "\N{MULTIPLICATION SIGN}",
}
"""Beside the word, so that no verdict is told by colour alone."""

_STYLES: Mapping[VerdictKind, str] = {
    VerdictKind.BETTER: "bold green",
    VerdictKind.WORSE: "bold red",
    VerdictKind.EQUIVALENT: "cyan",
    VerdictKind.NON_INFERIOR: "cyan",
    VerdictKind.NOT_COMPARED: "red",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table as text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def verdict_word(method: MethodSummary) -> str:
    """Return the verdict with its symbol."""
    return f"{SYMBOLS[method.verdict.kind]}\N{NO-BREAK SPACE}{method.verdict.kind}"


def result_table(comparison: Comparison) -> TextTable:
    """Return the answer: verdict, difference with interval, p, loss, parameters."""
    rows = []
    for method in comparison.methods:
        difference = method.difference
        tests = None if difference is None else difference.tests
        rows.append(
            (
                method.label,
                verdict_word(method),
                "" if difference is None else signed(difference.mean),
                "" if difference is None else interval_text(difference.interval),
                "" if tests is None else p_text(tests.sign_flip),
                "" if tests is None else p_text(_deciding(comparison, method)),
                spread_text(method.loss),
                count(method.parameters.mean),
                ABSENT if method.parameters.share is None else percent(method.parameters.share),
                f"{len(method.seeds)} of {len(method.seeds) + len(method.missing_seeds)}",
            )
        )
    return TextTable(
        title="Result",
        head=(
            "Method",
            "Verdict",
            "Difference",
            f"{100 * comparison.confidence:g} % interval",
            "p",
            "p corrected",
            "Test loss",
            "Parameters",
            "to baseline",
            "Seeds",
        ),
        rows=tuple(rows),
        note="Test loss in nats per supervised token, mean ± standard deviation over seeds, each "
        "method at its own best learning rate; a negative difference is better than the baseline.",
    )


def _deciding(comparison: Comparison, method: MethodSummary) -> float | None:
    if method.difference is None:
        return None
    tests = method.difference.tests
    return tests.max_t if comparison.correction == "max_t" else tests.holm


def score_table(comparison: Comparison) -> TextTable:
    """Return scores and cost, each as mean and standard deviation over seeds."""
    rows = []
    for m in comparison.methods:
        gap = m.exact_match_difference
        rows.append(
            (
                m.label,
                spread_text(m.perplexity, 3),
                spread_text(m.token_accuracy, 2, 100.0),
                spread_text(m.exact_match, 2, 100.0),
                ABSENT if gap is None else signed(100 * gap.mean, 2),
                ABSENT if m.lr is None else f"{m.lr:g}",
                ABSENT
                if m.reduction_vs_full.mean is None
                else plain(100 * m.reduction_vs_full.mean, 2),
                spread_text(m.efficiency_ratio, 3),
                spread_text(m.tokens_per_second, 0),
                bytes_text(m.peak_memory_bytes),
            )
        )
    return TextTable(
        title="Scores and cost",
        head=(
            "Method",
            "Perplexity",
            "Token accuracy %",
            "Exact match %",
            "Exact match to baseline",
            "Learning rate",
            "Fewer than full %",
            "Efficiency ratio",
            "Tokens / s",
            "Peak memory",
        ),
        rows=tuple(rows),
        note="Mean ± standard deviation over seeds on the test part. n/a: not scored or recorded.",
    )


def evidence_table(comparison: Comparison) -> TextTable:
    """Return the tests that stand beside the deciding one."""
    rows = []
    for method in comparison.methods:
        d = method.difference
        if d is None:
            continue
        shared = method.shared_rate
        margin = d.margin_tests
        effect = interval_text(d.effect.interval, 1)
        rows.append(
            (
                method.label,
                interval_text(d.hierarchical),
                ABSENT if shared is None else signed(shared.mean),
                ABSENT if shared is None else interval_text(shared.interval),
                ABSENT if d.effect.d_z is None else f"{signed(d.effect.d_z, 1)} {effect}",
                f"{100 * d.effect.superiority:.0f} %",
                p_text(d.tests.max_t),
                p_text(d.tests.wilcoxon),
                p_text(d.tests.paired_t),
                p_text(d.tests.normality),
                ABSENT if margin is None else p_text(margin.noninferior),
                ABSENT if margin is None else p_text(margin.equivalent),
                ABSENT if d.seeds_for_difference is None else str(d.seeds_for_difference),
            )
        )
    return TextTable(
        title="Beside the verdict",
        head=(
            "Method",
            "Interval, seeds and examples",
            "Difference at shared rate",
            "its interval",
            "Effect d_z",
            "Seeds won",
            "p max-T",
            "p Wilcoxon",
            "p paired t",
            "p normal",
            "p non-inferior",
            "p equivalent",
            "Seeds for 80 % power",
        ),
        rows=tuple(rows),
        note="Shared rate: method and baseline both at the baseline's best learning rate. p normal "
        "(Shapiro and Wilk) small speaks against the t test. n/a: the number does not exist here.",
    )


def rate_table(comparison: Comparison) -> TextTable:
    """Return the learning-rate curve of every method; empty where there was one rate."""
    rows = [
        (
            method.label,
            f"{rate.lr:g}",
            spread_text(rate.validation),
            spread_text(rate.test),
            str(rate.test.seeds),
            "chosen" if rate.chosen else "",
        )
        for method in comparison.methods
        if len(method.rates) > 1
        for rate in method.rates
    ]
    return TextTable(
        title="Learning rates",
        head=("Method", "Rate", "Validation loss", "Test loss", "Seeds", "Choice"),
        rows=tuple(rows),
        note="Chosen on validation loss among the rates that finished for the most seeds.",
    )


def failure_table(comparison: Comparison) -> TextTable:
    """Return every failed trial with its reason."""
    return TextTable(
        title="Failed trials",
        head=("Method", "Seed", "Fold", "Rate", "Reason", "Run"),
        rows=tuple(
            (f.method, str(f.seed), str(f.fold), f"{f.lr:g}", f.reason, f.run_id)
            for method in comparison.methods
            for f in method.failures
        ),
    )


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the verdict, what is unfair, and the result table."""
    console.print(Panel(Text(comparison.headline, style="bold"), title="Verdict"))
    if comparison.fairness:
        lines = Text("\n".join(f"! {finding}" for finding in comparison.fairness), style="red")
        console.print(Panel(lines, title="Less than fair", border_style="red"))
    console.print(_terminal_result(comparison, narrow=console.width < 140))
    for failure in (failure for method in comparison.methods for failure in method.failures):
        where = f"{failure.method}, seed {failure.seed}, fold {failure.fold}, lr {failure.lr:g}"
        console.print(Text(f"failed: {where}: {failure.reason}", style="red"))
    for note in comparison.notes:
        console.print(Text(note, style="dim"))
    console.print(Text(f"Champion: {comparison.winner} ({comparison.decision})"))


def _terminal_result(comparison: Comparison, *, narrow: bool) -> RichTable:
    """Return the result table; a narrow one leaves out what the text below says."""
    table = result_table(comparison)
    shown = [0, 1, 2, 3, 5, 6, 7] if narrow else list(range(len(table.head)))
    rich_table = RichTable(caption=table.note, caption_justify="left", show_lines=narrow)
    for column in shown:
        rich_table.add_column(
            table.head[column],
            justify="left" if column < 2 else "right",
            overflow="fold",
            min_width=20 if column == 0 else None,
        )
    for method, row in zip(comparison.methods, table.rows, strict=True):
        # The deviation is in the report; the difference is what a narrow terminal has room for.
        texts = [row[column].split(" ± ")[0] if narrow else row[column] for column in shown]
        cells = [Text(text) for text in texts]
        cells[1].stylize(_STYLES.get(method.verdict.kind, ""))
        rich_table.add_row(*cells)
    return rich_table


def render_markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """Return the whole comparison as Markdown, such as for an MLflow run description."""
    parts = [f"# {_escape(title)}", f"**{_escape(comparison.answer)}**"]
    parts.append(_escape(" ".join(comparison.remarks)))
    if comparison.fairness:
        parts.append("## Less than fair")
        parts.append("\n".join(f"- {_escape(finding)}" for finding in comparison.fairness))
    parts.append(_markdown_table(result_table(comparison)))
    parts.append("\n".join(f"- {_escape(note)}" for note in comparison.notes))
    parts.append(f"Champion: **{_escape(comparison.winner)}**: {_escape(comparison.decision)}.")
    parts.append("## Verdicts")
    parts.append(
        "\n".join(
            f"- **{_escape(m.label)}**: {_escape(m.verdict.text)}" for m in comparison.methods
        )
    )
    for make in (score_table, evidence_table, rate_table, failure_table):
        table = make(comparison)
        if table.rows:
            parts.append(_markdown_table(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: TextTable) -> str:
    lines = [f"## {table.title}", "", f"| {' | '.join(map(_escape, table.head))} |"]
    lines.append("|" + "---|" * len(table.head))
    lines += [f"| {' | '.join(map(_escape, row))} |" for row in table.rows]
    if table.note:
        lines += ["", _escape(table.note)]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is: no table breaks, links or HTML from data."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "|[]`*":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
