"""The tables of a comparison, made once and shown in terminal, Markdown, LaTeX and page.

`result_table` is the answer; `checks` are the failed trials and the fairness audit; `more_tables` are
the statistics beside the answer, which Markdown and page fold away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adaptive_lora.analysis.comparison import (
    AuditKind,
    Comparison,
    Difference,
    EarlyRate,
    MethodSummary,
    PowerAnswer,
    SeedMean,
    VerdictKind,
)
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.wording import (
    ABSENT,
    bytes_text,
    confidence_text,
    count,
    interval_text,
    intervals_note,
    mean_text,
    p_text,
    percent,
    plain,
    signed,
)
from adaptive_lora.analysis.stats import Interval
from adaptive_lora.results import NATS_PER_TOKEN

SYMBOLS: Mapping[VerdictKind, str] = {
    VerdictKind.BETTER: "\N{BLACK UP-POINTING TRIANGLE}",
    VerdictKind.NON_INFERIOR: "\N{GREATER-THAN OR EQUAL TO}",
    VerdictKind.EQUIVALENT: "\N{ALMOST EQUAL TO}",
    VerdictKind.BASELINE: "\N{BLACK DIAMOND}",
    VerdictKind.INCONCLUSIVE: "\N{WHITE CIRCLE}",
    VerdictKind.WORSE: "\N{BLACK DOWN-POINTING TRIANGLE}",
    VerdictKind.NOT_COMPARED: "\N{MULTIPLICATION SIGN}",
}
"""Symbol beside the word, so that no verdict is told by colour alone; in the order of sorted tables."""
OUTCOMES: Mapping[AuditKind, str] = {
    AuditKind.BAD: "\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}less than fair",
    AuditKind.UNKNOWN: "?\N{NO-BREAK SPACE}not recorded",
    AuditKind.OK: "\N{CHECK MARK}\N{NO-BREAK SPACE}fair",
}
"""Words of an audit's outcome, in the order in which they are listed."""


class Cell(NamedTuple):
    """One entry: the text shown, and the number that it is sorted by (None: sorted last)."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table as text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], note: str = "") -> TextTable:
    """Return a table without the columns in which no row has anything."""
    listed = list(rows)
    kept = [at for at in range(len(head)) if any(row[at].text not in ("", ABSENT) for row in listed)]
    shown = tuple(tuple(row[at] for at in kept) for row in listed)
    return TextTable(title=title, head=tuple(head[at] for at in kept), rows=shown, note=note)


def _of_methods(
    title: str, methods: Iterable[MethodSummary], columns: Mapping[str, Callable[[MethodSummary], Cell]], note: str
) -> TextTable:
    """Return a table with one row a method; columns map a heading to its reader."""
    rows = [(Cell(method.label), *(read(method) for read in columns.values())) for method in methods]
    return _table(title, ("Method", *columns), rows, note)


def _of_differences(
    title: str, comparison: Comparison, columns: Mapping[str, Callable[[MethodSummary, Difference], Cell]], note: str
) -> TextTable:
    """Return a table with one row a method that was compared with the baseline."""
    found = [(m, m.difference) for m in comparison.methods if m.difference is not None]
    rows = [(Cell(m.label), *(read(m, difference) for read in columns.values())) for m, difference in found]
    return _table(title, ("Method", *columns), rows, note)


def _signed(value: float | None, digits: int = 4) -> Cell:
    return Cell(ABSENT) if value is None else Cell(signed(value, digits), value)


def _plain(value: float | None, digits: int = 4) -> Cell:
    return Cell(plain(value, digits), value)


def _short(value: float | None) -> Cell:
    """Return a number as short as it can be written, such as a learning rate."""
    return Cell(ABSENT) if value is None else Cell(f"{value:g}", value)


def _count(number: float | None, otherwise: str = ABSENT) -> Cell:
    return Cell(otherwise) if number is None else Cell(count(number), number)


def _percentage(share: float | None) -> Cell:
    return Cell(ABSENT) if share is None else Cell(f"{100 * share:.0f} %", share)


def _p(p: float | None) -> Cell:
    return Cell(p_text(p), p)


def _mean(of_seeds: SeedMean, digits: int = 4, scale: float = 1.0) -> Cell:
    """Return mean ± standard deviation, sorted by the mean."""
    return Cell(mean_text(of_seeds, digits, scale), of_seeds.mean)


def _interval(interval: Interval | None, number: Callable[[float], str] = signed) -> Cell:
    """Return an interval, sorted by its lower end."""
    return Cell(ABSENT) if interval is None else Cell(interval_text(interval, number), interval.low)


def p_decides(comparison: Comparison, method: MethodSummary) -> float | None:
    """Return the corrected p that the verdict rests on."""
    return None if method.difference is None else comparison.deciding_p(method.difference)


def result_table(comparison: Comparison) -> TextTable:
    """Return the answer: rate, parameters, loss, difference with interval, p, verdict and cost of each method."""
    kinds = list(SYMBOLS)

    def parameters(m: MethodSummary) -> Cell:
        share = f" ({percent(m.parameters.share)})" if m.parameters.share else ""
        return Cell(count(m.parameters.mean) + share, m.parameters.mean)

    def difference(m: MethodSummary) -> Cell:
        if m.difference is None:
            return Cell("")
        return Cell(f"{signed(m.difference.mean)} {interval_text(m.difference.interval)}", m.difference.mean)

    def verdict(m: MethodSummary) -> Cell:
        kind = m.verdict.kind
        return Cell(f"{SYMBOLS[kind]}\N{NO-BREAK SPACE}{kind}", kinds.index(kind))

    def seconds(m: MethodSummary) -> Cell:
        mean = m.train_seconds.mean
        return Cell(ABSENT) if mean is None else Cell(f"{mean:,.1f} s", mean)

    unit = "nats per supervised token" if comparison.unit == NATS_PER_TOKEN else comparison.unit
    return _of_methods(
        "Result",
        comparison.methods,
        {
            "Learning rate": lambda m: _short(m.lr),
            "Parameters": parameters,
            "Test loss": lambda m: _mean(m.loss),
            f"Difference [{confidence_text(comparison.confidence)} interval]": difference,
            "p corrected": lambda m: Cell("") if m.difference is None else _p(p_decides(comparison, m)),
            "Verdict": verdict,
            "Training time": seconds,
        },
        f"Test loss in {unit}, mean ± standard deviation over seeds, each method at its own best learning rate; "
        "a negative difference is better than the baseline. In brackets after parameters: against the baseline. "
        "Training time: mean over seeds, without validation."
        f"{intervals_note(m.difference.interval for m in comparison.methods if m.difference)}",
    )


def _scores(comparison: Comparison) -> TextTable:
    def gap(m: MethodSummary) -> Cell:
        found = m.exact_match_difference
        return _signed(None if found is None else 100 * found.mean, 2)

    def gap_p(m: MethodSummary) -> Cell:
        return _p(None if m.exact_match_difference is None else m.exact_match_difference.sign_flip)

    def further(name: str) -> Callable[[MethodSummary], Cell]:
        return lambda m: _mean(m.further[name]) if name in m.further else Cell(ABSENT)

    accuracy = "Token accuracy %" if comparison.unit == NATS_PER_TOKEN else "Accuracy %"
    return _of_methods(
        "Scores",
        comparison.methods,
        {
            "Seeds": lambda m: Cell(f"{len(m.seeds)} of {len(m.seeds) + len(m.missing_seeds)}", len(m.seeds)),
            "Interval of the test loss": lambda m: _interval(m.loss_interval, plain),
            "Perplexity": lambda m: _mean(m.perplexity, 3),
            accuracy: lambda m: _mean(m.token_accuracy, 2, 100.0),
            **{name.replace("_", " "): further(name) for m in comparison.methods for name in m.further},
            "Exact match %": lambda m: _mean(m.exact_match, 2, 100.0),
            "Exact match to baseline": gap,
            "p of exact match": gap_p,
        },
        "Mean ± standard deviation over seeds on the test part. Intervals of one method hold what all methods "
        "share within a seed; the paired differences do not. p of exact match: sign flips, not corrected, no part "
        f"of the verdict.{intervals_note(m.loss_interval for m in comparison.methods)}",
    )


def _costs(comparison: Comparison) -> TextTable:
    def fronts(m: MethodSummary) -> Cell:
        on = [str(f.cost) for f in comparison.fronts for p in f.points if p.method == m.label and p.on_front]
        return Cell(", ".join(on) or "none")

    apart = any(m.trained_parameters.mean != m.parameters.mean for m in comparison.methods)
    return _of_methods(
        "Cost and efficiency",
        comparison.methods,
        {
            "Parameters trained": lambda m: _count(m.trained_parameters.mean if apart else None),
            "Training s": lambda m: _mean(m.train_seconds, 1),
            "Tokens / s": lambda m: _mean(m.tokens_per_second, 0),
            "Peak memory": lambda m: Cell(bytes_text(m.peak_memory_bytes), m.peak_memory_bytes.mean),
            "Efficiency ratio": lambda m: _mean(m.efficiency_ratio, 3),
            "Fewer than full %": lambda m: Cell(plain(m.reduction_vs_full.mean, 2, 100), m.reduction_vs_full.mean),
            "Early rate": lambda m: _early(m.early_rate),
            "Profile stability": lambda m: _mean(m.profile_stability, 2),
            "On the front of": fronts,
        },
        "Early rate: tokens until the validation loss is down to the baseline's final one under the same seed, as a "
        "share of the baseline's tokens; below 100 % is sooner. Efficiency ratio: test loss gained over the frozen "
        "base per million parameters served. Profile stability: Spearman correlation of importance from two halves "
        f"of the batches.{intervals_note(m.early_rate.interval for m in comparison.methods if m.early_rate)}",
    )


def _early(rate: EarlyRate | None) -> Cell:
    if rate is None:
        return Cell(ABSENT)
    if rate.share is None:
        return Cell(f"reached by {rate.reached} of {rate.seeds} seeds")
    interval = interval_text(rate.interval, lambda share: f"{100 * share:.0f}")
    return Cell(f"{100 * rate.share:.0f} %" + ("" if interval == ABSENT else f" {interval}"), rate.share)


def _areas(comparison: Comparison) -> TextTable:
    areas = comparison.areas if any(area.gain is not None for area in comparison.areas) else ()
    head = ("Family", "Budgets tried", "From, to parameters", "Gain", "its interval", "to baseline's family")
    rows = [
        (
            Cell(area.family),
            _count(len(area.methods)),
            Cell(ABSENT if area.low is None else f"{count(area.low)} to {count(area.high)}", area.low),
            _plain(area.gain),
            _interval(area.interval, plain),
            _signed(area.difference),
            _interval(area.difference_interval),
            Cell(area.note),
        )
        for area in areas
    ]
    return _table(
        "Area under the front",
        (*head, "interval of the difference", "Reason"),
        rows,
        "Methods that differ in nothing but rank or budget are one family. Gain: test loss below the frozen base, "
        f"averaged over log2 of the parameters; more is better.{intervals_note(area.interval for area in areas)}",
    )


def _effects(comparison: Comparison) -> TextTable:
    def effect(_: MethodSummary, d: Difference) -> Cell:
        interval = interval_text(d.effect.interval, lambda end: signed(end, 1))
        return Cell(ABSENT) if d.effect.d_z is None else Cell(f"{signed(d.effect.d_z, 1)} {interval}", d.effect.d_z)

    return _of_differences(
        "Size of the differences",
        comparison,
        {
            "Interval, seeds and examples": lambda _, d: _interval(d.hierarchical),
            "Difference at shared rate": lambda m, _: _signed(None if m.shared_rate is None else m.shared_rate.mean),
            "its interval": lambda m, _: _interval(None if m.shared_rate is None else m.shared_rate.interval),
            "Effect d_z": effect,
            "Seeds won": lambda _, d: _percentage(d.effect.superiority),
        },
        "Shared rate: method and baseline both at the baseline's best learning rate. d_z: mean over standard "
        "deviation of the paired differences. n/a: the number does not exist here."
        f"{intervals_note(m.difference.hierarchical for m in comparison.methods if m.difference)}",
    )


def _tests(comparison: Comparison) -> TextTable:
    return _of_differences(
        "Other tests",
        comparison,
        {
            "p sign flips": lambda _, d: _p(d.tests.sign_flip),
            "p Holm": lambda _, d: _p(d.tests.holm),
            "p max-T": lambda _, d: _p(d.tests.max_t),
            "p Wilcoxon": lambda _, d: _p(d.tests.wilcoxon),
            "p paired t": lambda _, d: _p(d.tests.paired_t),
            "p normal": lambda _, d: _p(d.tests.normality),
            "p symmetric": lambda _, d: _p(d.tests.symmetry),
        },
        "p sign flips: before correction; Holm and max-T correct it for several methods. p normal (Shapiro and "
        "Wilk) small speaks against the t test, p symmetric (D'Agostino, from 8 seeds) against Wilcoxon's.",
    )


def _margins(comparison: Comparison) -> TextTable:
    rows = [
        (Cell(m.label), _p(tests.noninferior), _p(tests.equivalent), _interval(tests.interval))
        for m in comparison.methods
        if m.difference is not None and (tests := m.difference.margin_tests) is not None
    ]
    level = confidence_text(one_sided(comparison.confidence))
    return _table(
        "Equivalence",
        ("Method", "p non-inferior", "p equivalent", f"{level} interval"),
        rows,
        "Both verdicts need their p and this interval, whole or its upper end, within the margin of "
        f"{plain(comparison.margin.value)} {comparison.unit}.",
    )


def _power(comparison: Comparison) -> TextTable:
    def cells(m: MethodSummary, answer: PowerAnswer) -> tuple[Cell, ...]:
        parts = m.difference.components if m.difference else None
        size = "observed" if answer.about == "observed" else "as large as the margin"
        return (
            Cell(m.label),
            Cell(f"{answer.difference:.4f}, {size}", answer.difference),
            _percentage(answer.power),
            _count(answer.seeds_needed, "more than 2,000"),
            _percentage(answer.simulated_power),
            _count(answer.examples_needed, "no number"),
            _count(answer.examples_at_least),
            _plain(None if parts is None else parts.seed**0.5),
            _plain(None if parts is None else parts.example**0.5),
        )

    head = ("Method", "To see a difference", "Power now", "Seeds for 80 %", "simulated", "Test examples for 80 %")
    return _table(
        "Seeds and examples needed",
        (*head, "of any seeds, at least", "Noise of seeds", "of examples"),
        [cells(m, answer) for m in comparison.methods if m.difference for answer in m.difference.power],
        "Paired t test at the corrected level, 0 where so few seeds cannot reach it by sign flips; simulated: power "
        "of the sign-flip test with its correction at that number of seeds. Test examples: with the seeds at hand. "
        f"Noise: standard deviation in {comparison.unit} between seeds, and between examples.",
    )


def _rates(comparison: Comparison) -> TextTable:
    rows = [
        (
            Cell(method.label),
            _short(rate.lr),
            _mean(rate.validation),
            _mean(rate.test),
            _count(rate.test.seeds),
            Cell("chosen" if rate.chosen else rate.raced.partition(":")[0]),
        )
        for method in comparison.methods
        if len(method.rates) > 1
        for rate in method.rates
    ]
    note = "Chosen on validation loss among the rates that finished for the most seeds."
    if comparison.raced_rates:
        note += " Rates that fell behind on validation loss were stopped on the way, by one rule for all methods."
    return _table("Learning rates", ("Method", "Rate", "Validation loss", "Test loss", "Seeds", "Choice"), rows, note)


def more_tables(comparison: Comparison) -> list[TextTable]:
    """Return the tables beside the answer, those with rows."""
    makers = (_scores, _costs, _effects, _tests, _margins, _power, _areas, _rates)
    return [table for make in makers if (table := make(comparison)).rows]


def checks(comparison: Comparison) -> list[TextTable]:
    """Return the failed trials, where there are any, and every check of the fairness audit."""
    failures = [
        (Cell(f.method), _count(f.seed), _count(f.fold), _short(f.lr), Cell(f.reason), Cell(f.run_id))
        for method in comparison.methods
        for f in method.failures
    ]
    audit = [
        (Cell(entry.topic), Cell(outcome, place), Cell(entry.text))
        for place, (kind, outcome) in enumerate(OUTCOMES.items())
        for entry in comparison.audit
        if entry.kind is kind
    ]
    tables = (
        _table("Failed trials", ("Method", "Seed", "Fold", "Rate", "Reason", "Run"), failures),
        _table("Fairness audit", ("Topic", "Outcome", "Finding"), audit),
    )
    return [table for table in tables if table.rows]
