"""Numbers to words: the verdict per method, the headline, the notes and the champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import wording as words
from adaptive_lora.analysis.comparison.findings import PowerAnswer
from adaptive_lora.analysis.comparison.inference import Rule, one_sided
from adaptive_lora.analysis.comparison.types import Difference, MethodSummary, Parameters, Verdict, VerdictKind

CORRECTIONS = {
    "holm": "Holm",
    "max_t": "step-down max-T",
    "benjamini_hochberg": "Benjamini and Hochberg, which bounds the share of false findings and not the chance of one",
}
_SIZES = {"observed": "of this size", "margin": "as large as the margin"}


def judge(difference: Difference, parameters: Parameters, rule: Rule) -> Verdict:
    """Return the verdict for one method.

    In this order: better (corrected p); non-inferior with fewer parameters (its own question,
    and loss within the margin was declared not to matter); worse (corrected p); equivalent;
    else no difference shown, with what it would take to show one. Equivalence and non-inferiority
    need their p and their interval; seeds that all gave the same value have none, and p alone decides.
    """
    surely = rule.corrected(difference) <= rule.alpha
    tests, margin = difference.margin_tests, rule.margin.value
    equivalent = noninferior = False
    if tests is not None and margin is not None:
        low, high = tests.interval.low, tests.interval.high
        below = high is None or high < margin
        noninferior = tests.noninferior <= rule.alpha and below
        equivalent = tests.equivalent <= rule.alpha and below and (low is None or low > -margin)
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
    text = f"{kind}: {evidence(difference, rule)}, {words.parameters_text(parameters)}."
    if kind is VerdictKind.INCONCLUSIVE:
        text += _undecided(difference, rule)
    elif surely and equivalent:
        text += f" The difference is sure but smaller than the margin of {words.plain(margin)}."
    elif kind in (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT) and tests is not None:
        p = tests.noninferior if kind is VerdictKind.NON_INFERIOR else tests.equivalent
        text += f" Margin {words.plain(margin)}, one-sided p {words.p_text(p)}"
        text += f", {words.interval_clause(tests.interval, one_sided(rule.confidence))}."
        if difference.tests.sign_flip <= rule.alpha:
            text += _out_of_reach(len(difference.seeds), rule)
    return Verdict(kind=kind, text=text)


def evidence(difference: Difference, rule: Rule) -> str:
    """Return the difference with interval, p-values and seeds."""
    return (
        f"test loss {words.signed(difference.mean)} {rule.unit} "
        f"({words.interval_clause(difference.interval, rule.confidence)}, "
        f"p {words.p_text(difference.tests.sign_flip)}, corrected {words.p_text(rule.corrected(difference))}, "
        f"{words.plural(len(difference.seeds), 'seed')})"
    )


def _out_of_reach(seeds: int, rule: Rule) -> str:
    least = rule.least_corrected(seeds)
    if least <= rule.alpha:
        return ""
    return (
        f" {words.plural(seeds, 'seed')} and {words.plural(rule.comparisons, 'comparison')} cannot reach a "
        f"corrected p under {words.p_text(least)}; {rule.seeds_required} seeds reach {rule.alpha:g}."
    )


def _undecided(difference: Difference, rule: Rule) -> str:
    """Say where sign flips alone would have shown equivalence, and what it takes to show a difference."""
    text, tests = "", difference.margin_tests
    if tests is not None and tests.equivalent <= rule.alpha:
        text = (
            f" Sign flips put it within the margin of {words.plain(rule.margin.value)} "
            f"(p {words.p_text(tests.equivalent)}), but its "
            f"{words.interval_clause(tests.interval, one_sided(rule.confidence))} leaves the margin."
        )
    text += _out_of_reach(len(difference.seeds), rule)
    if difference.sd is None:
        return text + " One seed has no standard deviation, so nothing can be said about power."
    needs = [f" A true difference {_SIZES[answer.about]} needs {_power_text(answer)}." for answer in difference.power]
    return text + "".join(needs)


def _power_text(answer: PowerAnswer) -> str:
    seeds = "more than 2,000" if answer.seeds_needed is None else f"about {answer.seeds_needed:,}"
    text = f"{seeds} seeds for 80 % power"
    if answer.examples_needed is None:
        return text + " (no number of test examples is enough for the seeds at hand)"
    if answer.examples_needed > answer.examples:
        text += f", or {answer.examples_needed:,} test examples instead of {answer.examples:,}"
    return text


def headline(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, tuple[str, ...]]:
    """Return the answer of the study, "no difference" as clearly as "better", and its remarks."""
    found = {m.label: m.difference for m in methods if m.difference is not None}
    others = [m for m in methods if m.label in found]
    if not others:
        return (f"Nothing could be compared with {rule.baseline}: no other method has a paired seed.", ())
    by_kind = {kind: [m for m in others if m.verdict.kind is kind] for kind in VerdictKind}
    better = sorted(by_kind[VerdictKind.BETTER], key=_loss)
    smaller = sorted(by_kind[VerdictKind.NON_INFERIOR], key=_size)
    equivalent, worse = by_kind[VerdictKind.EQUIVALENT], by_kind[VerdictKind.WORSE]
    unclear = by_kind[VerdictKind.INCONCLUSIVE]
    counted: list[MethodSummary] = []
    remarks: list[str] = []
    if better:
        counted = better[:1]
        answer = (
            f"{better[0].label} is better than {rule.baseline}: {evidence(found[better[0].label], rule)}, "
            f"{words.parameters_text(better[0].parameters)}"
        )
        answer += ", so this is no evidence about the allocation." if better[0].parameters.difference > 0 else "."
        remarks += _also_better(better, found, rule)
    elif smaller:
        counted = smaller[:1]
        answer = (
            f"No method is shown to be better than {rule.baseline}, but {smaller[0].label} holds its test loss "
            f"within {words.plain(rule.margin.value)} {rule.unit} {words.parameters_text(smaller[0].parameters)}."
        )
    elif len(worse) == len(others):
        whom = worse[0].label if len(worse) == 1 else f"all {len(worse)} other methods"
        answer = f"{rule.baseline} is better than {whom} in test loss."
    elif unclear:
        answer = _nothing_shown({m.label: found[m.label] for m in unclear}, len(others), rule)
    else:
        answer = f"No method is better than {rule.baseline}; equivalent to it: {_names(equivalent)}."
    seeds = max(len(difference.seeds) for difference in found.values())
    if not better and rule.least_corrected(seeds) > rule.alpha:
        remarks.append(
            f"With {words.plural(seeds, 'seed')} no method could have been shown to be better: "
            f"{words.plural(rule.comparisons, 'comparison')} {'needs' if rule.comparisons == 1 else 'need'} "
            f"{rule.seeds_required} seeds."
        )
    if equivalent and (better or smaller or unclear):  # else the answer has named them
        remarks.append(f"Equivalent: {_names(equivalent)}.")
    if worse and len(worse) < len(others):
        remarks.append(f"Worse: {_names(worse)}.")
    rest = [m.parameters for m in others if m not in counted]
    if shares := [one.share for one in rest if one.share and not one.matched]:
        remarks.append(f"Parameters are not equal: {words.span(shares, words.percent)} against the baseline.")
    return answer, tuple(remarks)


def _names(methods: Sequence[MethodSummary]) -> str:
    return words.named([m.label for m in methods])


def _loss(method: MethodSummary) -> float:
    return float("inf") if method.loss.mean is None else method.loss.mean


def _size(method: MethodSummary) -> float:
    return float("inf") if method.parameters.mean is None else method.parameters.mean


def _also_better(better: Sequence[MethodSummary], found: Mapping[str, Difference], rule: Rule) -> list[str]:
    """Name the best method without more parameters, if the best one has more; else all."""
    best, *others = better
    fair = [m for m in others if m.parameters.difference <= 0]
    if best.parameters.difference > 0 and fair:
        difference = found[fair[0].label]
        return [
            f"Better too, {words.parameters_text(fair[0].parameters)}: {fair[0].label} "
            f"({words.signed(difference.mean)}, corrected p {words.p_text(rule.corrected(difference))})."
        ]
    return [f"Better too: {_names(others)}."] if others else []


def _nothing_shown(unclear: Mapping[str, Difference], compared: int, rule: Rule) -> str:
    """Say between whom no difference is shown, which differences the intervals leave open, and why some have none."""
    whom = f"{rule.baseline} and {words.named(list(unclear))}"
    if len(unclear) == 1:
        whom = f"{next(iter(unclear))} and {rule.baseline}"
    elif len(unclear) == compared:
        whom = f"{rule.baseline} and any of the {compared} other methods"
    seeds = max(len(difference.seeds) for difference in unclear.values())
    text = f"No difference shown in test loss between {whom} over {words.plural(seeds, 'seed')}; "
    intervals = {label: difference.interval for label, difference in unclear.items()}
    ends = [(i.low, i.high) for i in intervals.values() if i.low is not None and i.high is not None]
    absent = {label: interval.note for label, interval in intervals.items() if interval.low is None}
    why = words.joined(sorted(set(absent.values())))
    if not ends:
        return f"{text}no interval, since {why}."
    text += (
        f"the {words.confidence_text(rule.confidence)} {'interval' if len(ends) == 1 else 'intervals'} "
        f"({words.interval_methods(intervals.values())}) {'allows' if len(ends) == 1 else 'allow'} from "
        f"{words.signed(min(low for low, _ in ends))} to {words.signed(max(high for _, high in ends))} {rule.unit}"
    )
    return f"{text}, with none for {words.named(list(absent))}, since {why}." if absent else f"{text}."


def choose_winner(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, str]:
    """Return the label of the champion and why.

    1. The method with the lowest mean test loss of those that are better after correction.
    2. Else, of those non-inferior or equivalent with fewer parameters, the one with the fewest.
    3. Else the baseline: a method must earn its place.
    """
    if better := [m for m in methods if m.verdict.kind is VerdictKind.BETTER]:
        best = min(better, key=_loss)
        return best.label, (
            f"lowest mean test loss of the methods that are better than {rule.baseline} after correction for "
            f"{words.plural(rule.comparisons, 'comparison')}, {words.parameters_text(best.parameters)}"
        )
    as_good = (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT)
    if frugal := [m for m in methods if m.verdict.kind in as_good and m.parameters.fewer]:
        least = min(frugal, key=lambda m: (_size(m), _loss(m)))
        return least.label, (
            f"no method is better than {rule.baseline}; fewest parameters of those whose loss is "
            f"within the margin, {words.parameters_text(least.parameters)}"
        )
    return rule.baseline, "no method is shown to be better, or as good with fewer parameters"


def read_with(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, ...]:
    """Return the notes, one a sentence or two."""
    differences = [m.difference for m in methods if m.difference is not None]
    notes = []
    if differences:
        seeds = max(len(difference.seeds) for difference in differences)
        least, corrected = stats.attainable_p(seeds), rule.least_corrected(seeds)
        counted, comparisons = words.plural(seeds, "seed"), words.plural(rule.comparisons, "comparison")
        if least > rule.alpha:
            notes.append(
                f"With {counted} no p-value under {rule.alpha:g} can be reached (least 2/2^{seeds} = "
                f"{words.p_text(least)}): intervals show what is known; {rule.seeds_required} seeds are needed for "
                f"{comparisons}."
            )
        elif corrected > rule.alpha:
            notes.append(
                f"With {counted} and {comparisons} the least corrected p is {words.p_text(corrected)}: no method can "
                f"be shown to be better or worse; {rule.seeds_required} seeds are needed, or fewer methods."
            )
        notes.append(
            f"Differences are method minus baseline in test loss, paired by seed; {_interval_note(differences, rule)}; "
            f"p by exact sign flips, corrected by {CORRECTIONS[rule.correction]}."
        )
    source = rule.margin.source
    if rule.margin.value is None:
        return (*notes, f"Margin: {source}.")
    return (
        *notes,
        f"Margin: {words.plain(rule.margin.value)} {rule.unit}, {source}. Equivalence and non-inferiority are "
        f"one-sided tests at {100 * rule.alpha:g} % each, not corrected for several methods; their verdict needs the "
        f"{words.confidence_text(one_sided(rule.confidence))} interval within the margin too.",
    )


def _interval_note(differences: Sequence[Difference], rule: Rule) -> str:
    """Return how the intervals over seeds were made, and why so where seeds are few."""
    intervals = [difference.interval for difference in differences]
    methods = words.interval_methods(intervals)
    if not methods:
        return f"no interval over seeds, since {words.named(sorted({i.note for i in intervals}))}"
    few = ", since a bootstrap of so few seeds is too narrow" if stats.STUDENT in methods else ""
    return f"{words.confidence_text(rule.confidence)} intervals over seeds: {methods}{few}"
