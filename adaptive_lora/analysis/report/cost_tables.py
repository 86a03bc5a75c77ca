"""Tables of what methods cost, of what it would take to know more, and of the audit."""

from __future__ import annotations

from collections.abc import Mapping

from adaptive_lora.analysis.comparison import AuditKind, Comparison, EarlyRate, MethodSummary, PowerAnswer
from adaptive_lora.analysis.comparison.wording import ABSENT, bytes_text, count, intervals_note
from adaptive_lora.analysis.report.cells import (
    Cell,
    TextTable,
    count_cell,
    interval_cell,
    plain_cell,
    plain_interval_cell,
    signed_cell,
    spread_cell,
)

OUTCOMES: Mapping[AuditKind, str] = {
    AuditKind.OK: "\N{CHECK MARK}\N{NO-BREAK SPACE}fair",
    AuditKind.BAD: "\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}less than fair",
    AuditKind.UNKNOWN: "?\N{NO-BREAK SPACE}not recorded",
}


def audit_table(comparison: Comparison) -> TextTable:
    """Return every check of the fairness audit with its outcome."""
    order = (AuditKind.BAD, AuditKind.UNKNOWN, AuditKind.OK)
    return TextTable(
        title="Fairness audit",
        head=("Topic", "Outcome", "Finding"),
        rows=tuple(
            (Cell(entry.topic), Cell(OUTCOMES[kind], order.index(kind)), Cell(entry.text))
            for kind in order
            for entry in comparison.audit
            if entry.kind is kind
        ),
    )


def efficiency_table(comparison: Comparison) -> TextTable:
    """Return what methods cost and how soon they are as good as the baseline ends."""
    fronts = {
        method.label: ", ".join(
            str(front.cost)
            for front in comparison.fronts
            for point in front.points
            if point.method == method.label and point.on_front
        )
        for method in comparison.methods
    }
    apart = any(m.trained_parameters.mean != m.parameters.mean for m in comparison.methods)
    rows = [
        (
            Cell(m.label),
            count_cell(m.trained_parameters.mean if apart else None),
            count_cell(m.parameters.mean),
            spread_cell(m.train_seconds, 1),
            spread_cell(m.tokens_per_second, 0),
            Cell(bytes_text(m.peak_memory_bytes), m.peak_memory_bytes.mean),
            spread_cell(m.efficiency_ratio, 3),
            plain_cell(_per_cent(m.reduction_vs_full.mean), 2),
            _early(m.early_rate),
            spread_cell(m.profile_stability, 2),
            Cell(fronts[m.label] or "none"),
        )
        for m in comparison.methods
    ]
    return TextTable(
        title="Cost and efficiency",
        head=(
            "Method",
            "Parameters trained",
            "Parameters served",
            "Training s",
            "Tokens / s",
            "Peak memory",
            "Efficiency ratio",
            "Fewer than full %",
            "Early rate",
            "Profile stability",
            "On the front of",
        ),
        rows=tuple(rows),
        note="Early rate: tokens until the validation loss is down to the baseline's final one "
        "under the same seed, as a share of the baseline's tokens; below 100 % is sooner. "
        "Efficiency ratio: test loss gained over the frozen base per million parameters served. "
        "Profile stability: Spearman correlation of importance from two halves of the batches."
        f"{intervals_note(m.early_rate.interval for m in comparison.methods if m.early_rate)}",
    ).without_empty_columns()


def _per_cent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _early(rate: EarlyRate | None) -> Cell:
    if rate is None:
        return Cell(ABSENT)
    if rate.share is None:
        return Cell(f"reached by {rate.reached} of {rate.seeds} seeds")
    text = f"{100 * rate.share:.0f} %"
    if rate.interval.low is not None and rate.interval.high is not None:
        text += f" [{100 * rate.interval.low:.0f}, {100 * rate.interval.high:.0f}]"
    return Cell(text, rate.share)


def area_table(comparison: Comparison) -> TextTable:
    """Return the area under each family's front; empty where no family has several budgets."""
    areas = comparison.areas if any(area.gain is not None for area in comparison.areas) else ()
    rows = []
    for area in areas:
        budgets = ABSENT
        if area.low is not None and area.high is not None:
            budgets = f"{count(area.low)} to {count(area.high)}"
        rows.append(
            (
                Cell(area.family),
                Cell(str(len(area.methods)), len(area.methods)),
                Cell(budgets, area.low),
                plain_cell(area.gain),
                plain_interval_cell(area.interval),
                signed_cell(area.difference),
                interval_cell(area.difference_interval),
                Cell(area.note),
            )
        )
    return TextTable(
        title="Area under the front",
        head=(
            "Family",
            "Budgets tried",
            "From, to parameters",
            "Gain",
            "its interval",
            "to baseline's family",
            "interval of the difference",
            "Reason",
        ),
        rows=tuple(rows),
        note="Methods that differ in nothing but rank or budget are one family. Gain: test "
        "loss below the frozen base, averaged over log2 of the parameters; more is better."
        f"{intervals_note(area.interval for area in comparison.areas)}",
    ).without_empty_columns()


def power_table(comparison: Comparison) -> TextTable:
    """Return what inconclusive comparisons would take, and where their noise comes from."""
    rows = [
        (Cell(method.label), *_power(method, answer))
        for method in comparison.methods
        if method.difference is not None
        for answer in method.difference.power
    ]
    return TextTable(
        title="What it would take",
        head=(
            "Method",
            "To see a difference",
            "Power now",
            "Seeds for 80 %",
            "simulated",
            "Test examples for 80 %",
            "of any seeds, at least",
            "Noise of seeds",
            "of examples",
        ),
        rows=tuple(rows),
        note="Paired t test at the corrected level, 0 where so few seeds cannot reach it by sign "
        "flips; simulated: power of the sign-flip test with its correction at that number of "
        "seeds. Test examples: with the seeds at hand. Noise: "
        f"standard deviation in {comparison.unit} between seeds, and between examples.",
    ).without_empty_columns()


def _power(method: MethodSummary, answer: PowerAnswer) -> tuple[Cell, ...]:
    assert method.difference is not None
    parts = method.difference.components
    size = "observed" if answer.about == "observed" else "as large as the margin"
    return (
        Cell(f"{answer.difference:.4f}, {size}", answer.difference),
        _percentage(answer.power),
        _needed(answer.seeds_needed, "more than 2,000"),
        _percentage(answer.simulated_power),
        _needed(answer.examples_needed, "no number"),
        count_cell(answer.examples_at_least),
        plain_cell(None if parts is None else parts.seed**0.5),
        plain_cell(None if parts is None else parts.example**0.5),
    )


def _percentage(share: float | None) -> Cell:
    return Cell(ABSENT) if share is None else Cell(f"{100 * share:.0f} %", share)


def _needed(number: int | None, otherwise: str) -> Cell:
    return Cell(otherwise) if number is None else count_cell(number)
