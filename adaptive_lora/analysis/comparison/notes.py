"""What a reader has to know to read the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.inference import one_sided
from adaptive_lora.analysis.comparison.types import Difference, MethodSummary
from adaptive_lora.analysis.comparison.verdict import Rule
from adaptive_lora.analysis.comparison.wording import confidence_text, interval_methods, named, p_text, plain, plural

CORRECTIONS = {
    "holm": "Holm",
    "max_t": "step-down max-T",
    "benjamini_hochberg": "Benjamini and Hochberg, which bounds the share of false findings and not the chance of one",
}


def read_with(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, ...]:
    """Return the notes, one a sentence or two."""
    differences = [m.difference for m in methods if m.difference is not None]
    notes = []
    if differences:
        seeds = max(len(difference.seeds) for difference in differences)
        least, corrected = stats.attainable_p(seeds), rule.least_corrected(seeds)
        counted = plural(seeds, "seed")
        if least > rule.alpha:
            notes.append(
                f"With {counted} no p-value under {rule.alpha:g} can be reached (least 2/2^{seeds} "
                f"= {p_text(least)}): intervals show what is known; {rule.seeds_required} seeds "
                f"are needed for {plural(rule.comparisons, 'comparison')}."
            )
        elif corrected > rule.alpha:
            notes.append(
                f"With {counted} and {plural(rule.comparisons, 'comparison')} the least corrected "
                f"p is {p_text(corrected)}: no method can be shown to be better or worse; "
                f"{rule.seeds_required} seeds are needed, or fewer methods."
            )
        notes.append(
            f"Differences are method minus baseline in test loss, paired by seed; "
            f"{_interval_note(differences, rule)}; p by exact sign flips, "
            f"corrected by {CORRECTIONS[rule.correction]}."
        )
    source = rule.margin.source
    if rule.margin.value is None:
        return (*notes, f"Margin: {source}.")
    return (
        *notes,
        f"Margin: {plain(rule.margin.value)} {rule.unit}, {source}. Equivalence and "
        f"non-inferiority are one-sided tests at {100 * rule.alpha:g} % each, not corrected for "
        f"several methods; their verdict needs the {confidence_text(one_sided(rule.confidence))} "
        "interval within the margin too.",
    )


def _interval_note(differences: Sequence[Difference], rule: Rule) -> str:
    """Return how the intervals over seeds were made, and why so where seeds are few."""
    intervals = [difference.interval for difference in differences]
    methods = interval_methods(intervals)
    if not methods:
        return f"no interval over seeds, since {named(sorted({i.note for i in intervals}))}"
    text = f"{confidence_text(rule.confidence)} intervals over seeds: {methods}"
    if stats.STUDENT in methods:
        text += ", since a bootstrap of so few seeds is too narrow"
    return text
