"""What a reader has to know to read the numbers of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_lora import stats
from adaptive_lora.comparison.types import MethodSummary
from adaptive_lora.comparison.verdict import Rule
from adaptive_lora.comparison.wording import p_text, plain, plural

CORRECTIONS = {
    "holm": "Holm",
    "max_t": "step-down max-T",
    "benjamini_hochberg": "Benjamini and Hochberg, which bounds the share of false findings and "
    "not the chance of one",
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
            f"{100 * rule.confidence:g} % bootstrap intervals over seeds; p by exact sign flips, "
            f"corrected by {CORRECTIONS[rule.correction]}."
        )
    source = rule.margin.source
    if rule.margin.value is None:
        return (*notes, f"Margin: {source}.")
    return (
        *notes,
        f"Margin: {plain(rule.margin.value)} {rule.unit}, {source}. Equivalence and "
        f"non-inferiority are one-sided tests at {100 * rule.alpha:g} % each, not corrected for "
        "several methods.",
    )
