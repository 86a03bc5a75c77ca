"""The tables of a comparison, made once and shown in terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Mapping

from adaptive_lora.analysis.comparison import Comparison, Difference, MethodSummary, VerdictKind
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import ABSENT, confidence_text, interval_text, intervals_note, signed
from adaptive_lora.analysis.report.cells import (
    Cell,
    TextTable,
    count_cell,
    general_cell,
    interval_cell,
    p_cell,
    percent_cell,
    plain_interval_cell,
    signed_cell,
    spread_cell,
)
from adaptive_lora.analysis.report.cost_tables import area_table, audit_table, efficiency_table, power_table
from adaptive_lora.results import NATS_PER_TOKEN

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

_RANKING = (
    VerdictKind.BETTER,
    VerdictKind.NON_INFERIOR,
    VerdictKind.EQUIVALENT,
    VerdictKind.BASELINE,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.WORSE,
    VerdictKind.NOT_COMPARED,
)
"""Order of verdicts where a table is sorted by them."""


def verdict_cell(method: MethodSummary) -> Cell:
    """Return the verdict with its symbol."""
    kind = method.verdict.kind
    return Cell(f"{SYMBOLS[kind]}\N{NO-BREAK SPACE}{kind}", _RANKING.index(kind))


def p_decides(comparison: Comparison, method: MethodSummary) -> float | None:
    """Return the corrected p that the verdict rests on."""
    if method.difference is None:
        return None
    return comparison.deciding_p(method.difference)


def result_table(comparison: Comparison) -> TextTable:
    """Return the answer: verdict, difference with interval, p, loss, parameters."""
    rows = []
    nothing = (Cell(""),) * 4
    for method in comparison.methods:
        difference = method.difference
        evidence = (
            nothing
            if difference is None
            else (
                signed_cell(difference.mean),
                interval_cell(difference.interval),
                p_cell(difference.tests.sign_flip),
                p_cell(p_decides(comparison, method)),
            )
        )
        seeds, planned = len(method.seeds), len(method.seeds) + len(method.missing_seeds)
        rows.append(
            (
                Cell(method.label),
                verdict_cell(method),
                *evidence,
                spread_cell(method.loss),
                count_cell(method.parameters.mean),
                percent_cell(method.parameters.share),
                Cell(f"{seeds} of {planned}", seeds),
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
        note=f"Test loss in {_supervised(comparison.unit)}, mean ± standard deviation over seeds, "
        "each method at its own best learning rate; a negative difference is better than the "
        f"baseline.{intervals_note(d.interval for d in _differences(comparison))}",
    )


def _differences(comparison: Comparison) -> list[Difference]:
    return [m.difference for m in comparison.methods if m.difference is not None]


def _supervised(unit: str) -> str:
    return "nats per supervised token" if unit == NATS_PER_TOKEN else unit


def score_table(comparison: Comparison) -> TextTable:
    """Return the scores on the test part, each as mean and standard deviation over seeds."""
    rows = []
    further = list(dict.fromkeys(name for m in comparison.methods for name in m.further))
    of_tokens = comparison.unit == NATS_PER_TOKEN
    for m in comparison.methods:
        gap = m.exact_match_difference
        rows.append(
            (
                Cell(m.label),
                spread_cell(m.loss),
                plain_interval_cell(m.loss_interval),
                spread_cell(m.perplexity, 3),
                spread_cell(m.token_accuracy, 2, 100.0),
                *(spread_cell(m.further[name], 4) if name in m.further else Cell(ABSENT) for name in further),
                spread_cell(m.exact_match, 2, 100.0),
                signed_cell(None if gap is None else 100 * gap.mean, 2),
                p_cell(None if gap is None else gap.sign_flip),
                general_cell(m.lr),
            )
        )
    return TextTable(
        title="Scores",
        head=(
            "Method",
            "Test loss",
            "its interval",
            "Perplexity",
            "Token accuracy %" if of_tokens else "Accuracy %",
            *(name.replace("_", " ") for name in further),
            "Exact match %",
            "Exact match to baseline",
            "p of exact match",
            "Learning rate",
        ),
        rows=tuple(rows),
        note="Mean ± standard deviation over seeds on the test part. Intervals of one method hold "
        "what all methods share within a seed; the paired differences above do not. p of exact "
        "match: sign flips, not corrected, no part of the verdict."
        f"{intervals_note(m.loss_interval for m in comparison.methods)}",
    ).without_empty_columns()


def _evidence_row(method: MethodSummary, d: Difference) -> tuple[Cell, ...]:
    shared, margin, d_z = method.shared_rate, d.margin_tests, d.effect.d_z
    effect = interval_text(d.effect.interval, 1)
    seeds = d.seeds_for_difference
    return (
        Cell(method.label),
        interval_cell(d.hierarchical),
        signed_cell(None if shared is None else shared.mean),
        interval_cell(None if shared is None else shared.interval),
        Cell(ABSENT) if d_z is None else Cell(f"{signed(d_z, 1)} {effect}", d_z),
        Cell(f"{100 * d.effect.superiority:.0f} %", d.effect.superiority),
        p_cell(d.tests.max_t),
        p_cell(d.tests.wilcoxon),
        p_cell(d.tests.paired_t),
        p_cell(d.tests.normality),
        p_cell(d.tests.symmetry),
        p_cell(None if margin is None else margin.noninferior),
        p_cell(None if margin is None else margin.equivalent),
        interval_cell(None if margin is None else margin.interval),
        Cell(ABSENT if seeds is None else str(seeds), seeds),
    )


def evidence_table(comparison: Comparison) -> TextTable:
    """Return the tests that stand beside the deciding one."""
    rows = [_evidence_row(method, method.difference) for method in comparison.methods if method.difference is not None]
    shown = [
        interval
        for d in _differences(comparison)
        for interval in (d.hierarchical, d.margin_tests.interval if d.margin_tests else None)
    ]
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
            "p symmetric",
            "p non-inferior",
            "p equivalent",
            f"{confidence_text(one_sided(comparison.confidence))} interval",
            "Seeds for 80 % power",
        ),
        rows=tuple(rows),
        note="Shared rate: method and baseline both at the baseline's best learning rate. p "
        "normal (Shapiro and Wilk) small speaks against the t test, p symmetric (D'Agostino, from "
        "8 seeds) against Wilcoxon's. Equivalence and non-inferiority need their p and the last "
        "interval, whole or its upper end, within the margin. n/a: the number does not exist here."
        f"{intervals_note(shown)}",
    )


def rate_table(comparison: Comparison) -> TextTable:
    """Return the learning-rate curve of every method; empty where there was one rate."""
    rows = [
        (
            Cell(method.label),
            general_cell(rate.lr),
            spread_cell(rate.validation),
            spread_cell(rate.test),
            Cell(str(rate.test.seeds), rate.test.seeds),
            Cell("chosen" if rate.chosen else rate.raced.partition(":")[0]),
        )
        for method in comparison.methods
        if len(method.rates) > 1
        for rate in method.rates
    ]
    return TextTable(
        title="Learning rates",
        head=("Method", "Rate", "Validation loss", "Test loss", "Seeds", "Choice"),
        rows=tuple(rows),
        note="Chosen on validation loss among the rates that finished for the most seeds."
        + (
            " Rates that fell behind on validation loss were stopped on the way, by one rule for all methods."
            if comparison.raced_rates
            else ""
        ),
    )


def failure_table(comparison: Comparison) -> TextTable:
    """Return every failed trial with its reason."""
    return TextTable(
        title="Failed trials",
        head=("Method", "Seed", "Fold", "Rate", "Reason", "Run"),
        rows=tuple(
            (
                Cell(f.method),
                Cell(str(f.seed), f.seed),
                Cell(str(f.fold), f.fold),
                general_cell(f.lr),
                Cell(f.reason),
                Cell(f.run_id),
            )
            for method in comparison.methods
            for f in method.failures
        ),
    )


def further_tables(comparison: Comparison) -> list[TextTable]:
    """Return the tables that follow the result, those with rows."""
    makers = (
        score_table,
        efficiency_table,
        area_table,
        evidence_table,
        power_table,
        rate_table,
        failure_table,
        audit_table,
    )
    return [table for make in makers if (table := make(comparison)).rows]
