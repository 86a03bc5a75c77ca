"""What an inconclusive comparison would take: seeds, or examples."""

from __future__ import annotations

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import PowerAnswer
from adaptive_lora.analysis.stats import Components, Correction

POWER = 0.8


def power_answer(
    about: str,
    difference: float,
    components: Components,
    *,
    spread: float,
    comparisons: int,
    correction: Correction,
    alpha: float,
) -> PowerAnswer | None:
    """Return what it takes to see a difference; None where it or the spread is 0.

    Args:
        about: `observed` or `margin`.
        difference: true difference in nats per token.
        components: of the paired differences, where more examples come from.
        spread: standard deviation of the paired differences over seeds.
        comparisons: methods that are corrected for.
        correction: that decides.
        alpha: level after correction.
    """
    if difference == 0 or spread == 0:
        return None
    size, each = abs(difference), alpha / max(1, comparisons)
    needed, simulated = stats.checked_seeds(
        size, spread, comparisons=comparisons, correction=correction, alpha=alpha, power=POWER
    )
    first = alpha if correction == "max_t" else each
    examples = stats.examples_for_power(size, components, components.seeds, alpha=first)
    now, least = 0.0, None
    if components.seeds >= stats.fewest_seeds(alpha, comparisons=comparisons, correction=correction):
        now = stats.paired_power(size, spread, components.seeds, alpha=first)
    if components.example > 0:
        least = stats.examples_for_new_examples(size, components, alpha=each)
    return PowerAnswer(
        about=about,
        difference=size,
        seeds=components.seeds,
        examples=components.examples,
        power=now,
        seeds_needed=needed,
        simulated_power=simulated,
        examples_needed=examples,
        examples_at_least=least,
    )


def power_text(answer: PowerAnswer) -> str:
    """Return the answer as the end of a sentence about a difference."""
    known = answer.seeds_needed
    seeds = "more than 2,000" if known is None else f"about {known:,}"
    text = f"{seeds} seeds for 80 % power"
    if answer.examples_needed is None:
        return text + " (no number of test examples is enough for the seeds at hand)"
    if answer.examples_needed > answer.examples:
        text += f", or {answer.examples_needed:,} test examples instead of {answer.examples:,}"
    return text
