"""From numbers to words: the verdict per method, the headline and the champion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_lora.comparison.power import power_text
from adaptive_lora.comparison.types import (
    Difference,
    Margin,
    MethodSummary,
    Parameters,
    Verdict,
    VerdictKind,
)
from adaptive_lora.comparison.wording import (
    interval_text,
    named,
    p_text,
    parameters_text,
    percent,
    plain,
    plural,
    signed,
)
from adaptive_lora.results import NATS_PER_TOKEN
from adaptive_lora.stats import Correction, attainable_p, least_seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What decides, the same for all methods of a comparison."""

    baseline: str
    alpha: float
    confidence: float
    correction: Correction
    comparisons: int
    margin: Margin
    unit: str = NATS_PER_TOKEN
    """What losses are counted in."""

    @property
    def interval_name(self) -> str:
        """Name of the interval, such as "95 % interval"."""
        return f"{100 * self.confidence:g} % interval"

    def corrected(self, difference: Difference) -> float:
        """Return the p that decides."""
        return float(getattr(difference.tests, self.correction))

    def least_corrected(self, seeds: int) -> float:
        """Return the least corrected p that so many seeds can reach for the best method."""
        return min(1.0, self._factor * attainable_p(seeds))

    @property
    def _factor(self) -> int:
        """How far the correction raises the least p: Benjamini-Hochberg not, if all reach it."""
        return max(1, self.comparisons) if self.correction == "holm" else 1

    @property
    def seeds_required(self) -> int:
        """Seeds at which a corrected p can reach alpha at all."""
        return least_seeds(self.alpha / self._factor)


def judge(difference: Difference, parameters: Parameters, rule: Rule) -> Verdict:
    """Return the verdict for one method.

    In this order: better (corrected p); non-inferior with fewer parameters (its own question,
    and loss within the margin was declared not to matter); worse (corrected p); equivalent;
    else no difference shown, with what it would take to show one.
    """
    surely = rule.corrected(difference) <= rule.alpha
    margin = difference.margin_tests
    equivalent = margin is not None and margin.equivalent <= rule.alpha
    noninferior = margin is not None and margin.noninferior <= rule.alpha
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
        text += _what_it_takes(difference, rule)
    elif surely and equivalent:
        text += (
            f" The difference is sure but smaller than the margin of {plain(rule.margin.value)}."
        )
    elif kind in (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT) and margin is not None:
        p = margin.noninferior if kind is VerdictKind.NON_INFERIOR else margin.equivalent
        text += f" Margin {plain(rule.margin.value)}, one-sided p {p_text(p)}."
        if difference.tests.sign_flip <= rule.alpha:
            text += _out_of_reach(len(difference.seeds), rule)
    return Verdict(kind=kind, text=text)


def evidence(difference: Difference, rule: Rule) -> str:
    """Return the difference with interval, p-values and seeds."""
    interval = interval_text(difference.interval)
    return (
        f"test loss {signed(difference.mean)} {rule.unit} ({rule.interval_name} {interval}, "
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
        return text + " One seed shows no spread, so nothing can be said about power."
    sizes = {"observed": "of this size", "margin": "as large as the margin"}
    for answer in difference.power:
        text += f" A true difference {sizes[answer.about]} needs {power_text(answer)}."
    return text


def headline(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, tuple[str, ...]]:
    """Return the answer of the study, "no difference" as clearly as "better", and its remarks."""
    others = [m for m in methods if m.difference is not None]
    if not others:
        return (
            f"Nothing could be compared with {rule.baseline}: no other method has a paired seed.",
            (),
        )
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
            f"{plural(seeds, 'seed')} could not have shown a better one: "
            f"{plural(rule.comparisons, 'comparison')} take {rule.seeds_required} seeds."
        )
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
    differences = [m.difference for m in unclear if m.difference is not None]
    seeds = max(len(d.seeds) for d in differences)
    text = f"No difference shown in test loss between {whom} over {plural(seeds, 'seed')}"
    lows = [d.interval.low for d in differences if d.interval.low is not None]
    highs = [d.interval.high for d in differences if d.interval.high is not None]
    if lows and highs:
        text += (
            f"; the intervals allow from {signed(min(lows))} to {signed(max(highs))} {rule.unit}"
        )
    return text + "."


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

    1. Of the methods that are better after correction, the one with the lowest mean test loss.
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
        if m.verdict.kind in (VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT)
        and m.parameters.fewer
    ]
    if frugal:
        least = min(frugal, key=lambda m: (_size(m), _loss(m)))
        return least.label, (
            f"no method is better than {rule.baseline}; fewest parameters of those whose loss is "
            f"within the margin, {parameters_text(least.parameters)}"
        )
    return rule.baseline, "no method is shown to be better, or as good with fewer parameters"
