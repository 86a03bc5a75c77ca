"""Numbers to words: the verdict per method, the headline, the notes and the champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import PowerAnswer
from adaptive_lora.analysis.comparison.inference import Rule, one_sided
from adaptive_lora.analysis.comparison.types import (
    Difference,
    MarginTests,
    MethodSummary,
    Parameters,
    Verdict,
    VerdictKind,
)
from adaptive_lora.analysis.comparison.wording import (
    confidence_text,
    interval_clause,
    interval_methods,
    joined,
    named,
    p_text,
    parameters_text,
    percent,
    plain,
    plural,
    signed,
)
from adaptive_lora.analysis.stats import Interval

CORRECTIONS = {
    "holm": "Holm",
    "max_t": "step-down max-T",
    "benjamini_hochberg": "Benjamini and Hochberg, which bounds the share of false findings and not the chance of one",
}


def judge(difference: Difference, parameters: Parameters, rule: Rule) -> Verdict:
    """Return the verdict for one method.

    In this order: better (corrected p); non-inferior with fewer parameters (its own question,
    and loss within the margin was declared not to matter); worse (corrected p); equivalent;
    else no difference shown, with what it would take to show one.
    """
    surely = rule.corrected(difference) <= rule.alpha
    margin = difference.margin_tests
    equivalent, noninferior = _within_margin(margin, rule)
    if surely and difference.mean < 0:
        kind = VerdictKind.BETTER
    elif noninferior and parameters.fewer:
        kind = VerdictKind.NON_INFERIOR
    elif surely and difference.mean > 0:
        kind = VerdictKind.WORSE
    elif equivalent:
        kind = VerdictKind.EQUIVALENT
    else:
        kind = VerdictKind.INCONCLUSIVE
    text = f"{kind}: {evidence(difference, rule)}, {parameters_text(parameters)}."
    if kind is VerdictKind.INCONCLUSIVE:
        text += _margin_undecided(margin, rule) + _what_it_takes(difference, rule)
    elif surely and equivalent:
        text += f" The difference is sure but smaller than the margin of {plain(rule.margin.value)}."
    elif kind in (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT) and margin is not None:
        p = margin.noninferior if kind is VerdictKind.NON_INFERIOR else margin.equivalent
        text += f" Margin {plain(rule.margin.value)}, one-sided p {p_text(p)}"
        text += f", {interval_clause(margin.interval, one_sided(rule.confidence))}."
        if difference.tests.sign_flip <= rule.alpha:
            text += _out_of_reach(len(difference.seeds), rule)
    return Verdict(kind=kind, text=text)


def _within_margin(tests: MarginTests | None, rule: Rule) -> tuple[bool, bool]:
    """Tell whether equivalence and non-inferiority are shown, by their p and by their interval.

    Seeds that all gave the same value have no interval; there the p alone decides.
    """
    margin = rule.margin.value
    if tests is None or margin is None:
        return False, False
    low, high = tests.interval.low, tests.interval.high
    above, below = low is None or low > -margin, high is None or high < margin
    noninferior = tests.noninferior <= rule.alpha and below
    return tests.equivalent <= rule.alpha and above and below, noninferior


def _margin_undecided(tests: MarginTests | None, rule: Rule) -> str:
    """Say where sign flips alone would have shown equivalence, and the interval does not."""
    if tests is None or tests.equivalent > rule.alpha:
        return ""
    return (
        f" Sign flips put it within the margin of {plain(rule.margin.value)} (p "
        f"{p_text(tests.equivalent)}), but its "
        f"{interval_clause(tests.interval, one_sided(rule.confidence))} leaves the margin."
    )


def evidence(difference: Difference, rule: Rule) -> str:
    """Return the difference with interval, p-values and seeds."""
    interval = interval_clause(difference.interval, rule.confidence)
    return (
        f"test loss {signed(difference.mean)} {rule.unit} ({interval}, "
        f"p {p_text(difference.tests.sign_flip)}, corrected {p_text(rule.corrected(difference))}, "
        f"{plural(len(difference.seeds), 'seed')})"
    )


def _out_of_reach(seeds: int, rule: Rule) -> str:
    least = rule.least_corrected(seeds)
    if least <= rule.alpha:
        return ""
    return (
        f" {plural(seeds, 'seed')} and {plural(rule.comparisons, 'comparison')} cannot reach a "
        f"corrected p under {p_text(least)}; {rule.seeds_required} seeds reach {rule.alpha:g}."
    )


def _what_it_takes(difference: Difference, rule: Rule) -> str:
    seeds = len(difference.seeds)
    text = _out_of_reach(seeds, rule)
    if difference.sd is None:
        return text + " One seed has no standard deviation, so nothing can be said about power."
    sizes = {"observed": "of this size", "margin": "as large as the margin"}
    for answer in difference.power:
        text += f" A true difference {sizes[answer.about]} needs {power_text(answer)}."
    return text


def headline(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, tuple[str, ...]]:
    """Return the answer of the study, "no difference" as clearly as "better", and its remarks."""
    others = [m for m in methods if m.difference is not None]
    if not others:
        return (f"Nothing could be compared with {rule.baseline}: no other method has a paired seed.", ())
    by_kind = {kind: [m for m in others if m.verdict.kind is kind] for kind in VerdictKind}
    better = sorted(by_kind[VerdictKind.BETTER], key=_loss)
    smaller = sorted(by_kind[VerdictKind.NON_INFERIOR], key=_size)
    equivalent, worse = by_kind[VerdictKind.EQUIVALENT], by_kind[VerdictKind.WORSE]
    counted: list[MethodSummary] = []
    remarks: list[str] = []
    if better:
        answer, counted = _is_better(better[0], rule), better[:1]
        remarks += _also_better(better, rule)
    elif smaller:
        counted = smaller[:1]
        answer = (
            f"No method is shown to be better than {rule.baseline}, but {smaller[0].label} holds "
            f"its test loss within {plain(rule.margin.value)} {rule.unit} "
            f"{parameters_text(smaller[0].parameters)}."
        )
    elif len(worse) == len(others):
        whom = worse[0].label if len(worse) == 1 else f"all {len(worse)} other methods"
        answer = f"{rule.baseline} is better than {whom} in test loss."
    elif by_kind[VerdictKind.INCONCLUSIVE]:
        answer = _nothing_shown(by_kind[VerdictKind.INCONCLUSIVE], len(others), rule)
    else:
        names = named([m.label for m in equivalent])
        answer = f"No method is better than {rule.baseline}; equivalent to it: {names}."
    seeds = max(len(m.difference.seeds) for m in others if m.difference)
    if not better and rule.least_corrected(seeds) > rule.alpha:
        remarks.append(
            f"With {plural(seeds, 'seed')} no method could have been shown to be better: "
            f"{plural(rule.comparisons, 'comparison')} "
            f"{'needs' if rule.comparisons == 1 else 'need'} {rule.seeds_required} seeds."
        )
    named_already = not (better or smaller or by_kind[VerdictKind.INCONCLUSIVE])
    if equivalent and not named_already:
        remarks.append(f"Equivalent: {named([m.label for m in equivalent])}.")
    if worse and len(worse) < len(others):
        remarks.append(f"Worse: {named([m.label for m in worse])}.")
    return answer, (*remarks, *_unequal([m for m in others if m not in counted]))


def _loss(method: MethodSummary) -> float:
    return float("inf") if method.loss.mean is None else method.loss.mean


def _size(method: MethodSummary) -> float:
    return float("inf") if method.parameters.mean is None else method.parameters.mean


def _bigger(method: MethodSummary) -> bool:
    return method.parameters.difference > 0


def _is_better(best: MethodSummary, rule: Rule) -> str:
    assert best.difference is not None  # a method without a difference has no such verdict
    text = (
        f"{best.label} is better than {rule.baseline}: {evidence(best.difference, rule)}, "
        f"{parameters_text(best.parameters)}"
    )
    return text + (", so this is no evidence about the allocation." if _bigger(best) else ".")


def _also_better(better: Sequence[MethodSummary], rule: Rule) -> list[str]:
    """Name the best method without more parameters, if the best one has more; else all."""
    fair = [m for m in better[1:] if not _bigger(m)]
    if _bigger(better[0]) and fair:
        difference = fair[0].difference
        assert difference is not None
        return [
            f"Better too, {parameters_text(fair[0].parameters)}: {fair[0].label} "
            f"({signed(difference.mean)}, corrected p {p_text(rule.corrected(difference))})."
        ]
    names = named([m.label for m in better[1:]])
    return [f"Better too: {names}."] if names else []


def _nothing_shown(unclear: Sequence[MethodSummary], compared: int, rule: Rule) -> str:
    if len(unclear) == 1:
        whom = f"{unclear[0].label} and {rule.baseline}"
    elif len(unclear) == compared:
        whom = f"{rule.baseline} and any of the {compared} other methods"
    else:
        whom = f"{rule.baseline} and {named([m.label for m in unclear])}"
    found = {m.label: m.difference for m in unclear if m.difference is not None}
    seeds = max(len(difference.seeds) for difference in found.values())
    text = f"No difference shown in test loss between {whom} over {plural(seeds, 'seed')}"
    return f"{text}; {_allowed({label: d.interval for label, d in found.items()}, rule)}."


def _allowed(intervals: Mapping[str, Interval], rule: Rule) -> str:
    """Say which differences the intervals leave open, and which methods have none and why."""
    lows = [interval.low for interval in intervals.values() if interval.low is not None]
    highs = [interval.high for interval in intervals.values() if interval.high is not None]
    absent = {label: i.note for label, i in intervals.items() if i.low is None}
    why = joined(sorted(set(absent.values())))
    if not lows:
        return f"no interval, since {why}"
    noun, verb = ("interval", "allows") if len(lows) == 1 else ("intervals", "allow")
    text = (
        f"the {confidence_text(rule.confidence)} {noun} "
        f"({interval_methods(intervals.values())}) {verb} from {signed(min(lows))} to "
        f"{signed(max(highs))} {rule.unit}"
    )
    return f"{text}, with none for {named(list(absent))}, since {why}" if absent else text


def _unequal(others: Sequence[MethodSummary]) -> list[str]:
    known = [m.parameters.share for m in others if m.parameters.share and not m.parameters.matched]
    if not known:
        return []
    span = percent(min(known))
    if max(known) != min(known):
        span += f" to {percent(max(known))}"
    return [f"Parameters are not equal: {span} against the baseline."]


def choose_winner(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, str]:
    """Return the label of the champion and why.

    1. The method with the lowest mean test loss of those that are better after correction.
    2. Else, of those non-inferior or equivalent with fewer parameters, the one with the fewest.
    3. Else the baseline: a method must earn its place.
    """
    better = [m for m in methods if m.verdict.kind is VerdictKind.BETTER]
    if better:
        best = min(better, key=_loss)
        return best.label, (
            f"lowest mean test loss of the methods that are better than {rule.baseline} after "
            f"correction for {plural(rule.comparisons, 'comparison')}, "
            f"{parameters_text(best.parameters)}"
        )
    frugal = [
        m
        for m in methods
        if m.verdict.kind in (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT) and m.parameters.fewer
    ]
    if frugal:
        least = min(frugal, key=lambda m: (_size(m), _loss(m)))
        return least.label, (
            f"no method is better than {rule.baseline}; fewest parameters of those whose loss is "
            f"within the margin, {parameters_text(least.parameters)}"
        )
    return rule.baseline, "no method is shown to be better, or as good with fewer parameters"


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
