"""The verdict per method, the headline, the notes and the champion; `verdict.txt.jinja` has their words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from jinja2 import Template

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import wording
from adaptive_lora.analysis.comparison.findings import RetainedSource, VerdictKind
from adaptive_lora.analysis.comparison.inference import Rule, one_sided
from adaptive_lora.analysis.comparison.types import NO_WINNER, Difference, MethodSummary, Parameters, Verdict


@cache
def _template() -> Template:
    environment = wording.environment("adaptive_lora.analysis.comparison")
    environment.globals.update(words=wording, one_sided=one_sided, student=stats.STUDENT)
    return environment.get_template("verdict.txt.jinja")


def _paragraphs(macro: str, **values: Any) -> tuple[str, ...]:
    """Return the paragraphs that a macro of the template writes."""
    text = str(getattr(_template().module, macro)(**values))
    return tuple(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def sentence(macro: str, **values: Any) -> str:
    """Return the one paragraph that a macro of the template writes."""
    return " ".join(_paragraphs(macro, **values))


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
        low, high = rule.outcome.as_loss(tests.interval)
        below = high is None or high < margin
        noninferior = tests.noninferior <= rule.alpha and below
        equivalent = tests.equivalent <= rule.alpha and below and (low is None or low > -margin)
    if surely and rule.outcome.sign * difference.mean < 0:
        kind = VerdictKind.BETTER
    elif noninferior and parameters.fewer:
        kind = VerdictKind.NON_INFERIOR
    elif surely and rule.outcome.sign * difference.mean > 0:
        kind = VerdictKind.WORSE
    elif equivalent:
        kind = VerdictKind.EQUIVALENT
    else:
        kind = VerdictKind.INCONCLUSIVE
    text = sentence(
        "method",
        kind=str(kind),
        difference=difference,
        parameters=parameters,
        rule=rule,
        surely=surely,
        equivalent=equivalent,
    )
    return Verdict(kind=kind, text=text)


def headline(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, tuple[str, ...]]:
    """Return the answer of the study, "no difference" as clearly as "better", and its remarks."""
    compared = [m for m in methods if m.difference is not None]
    found: Mapping[str, Any] = {
        "rule": rule,
        "compared": compared,
        "better": sorted(_of(compared, VerdictKind.BETTER), key=partial(_loss, rule)),
        "smaller": sorted(_of(compared, VerdictKind.NON_INFERIOR), key=_size),
        "worse": _of(compared, VerdictKind.WORSE),
        "equivalent": _of(compared, VerdictKind.EQUIVALENT),
        "unclear": _of(compared, VerdictKind.INCONCLUSIVE),
    }
    return sentence("answer", **found), _paragraphs("remarks", **found) if compared else ()


def _of(methods: Sequence[MethodSummary], *kinds: VerdictKind) -> list[MethodSummary]:
    return [m for m in methods if m.verdict.kind in kinds]


def _loss(rule: Rule, method: MethodSummary) -> float:
    return float("inf") if method.loss.mean is None else rule.outcome.sign * method.loss.mean


def _size(method: MethodSummary) -> float:
    return float("inf") if method.parameters.mean is None else method.parameters.mean


def choose_winner(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, str]:
    """Return the label of the champion and why.

    Methods that may forget more than is allowed are left out. Of the others:

    1. The method with the best mean outcome, such as the lowest test loss, of those that are better after correction.
    2. Else, of those non-inferior or equivalent with fewer parameters, the one with the fewest.
    3. Else the baseline: a method must earn its place.
    4. Else, if the baseline is left out too, none.
    """
    barred = [m for m in methods if m.barred]
    able = [m for m in methods if not m.barred]
    best = min(_of(able, VerdictKind.BETTER), key=partial(_loss, rule), default=None)
    as_good = [m for m in _of(able, VerdictKind.NON_INFERIOR, VerdictKind.EQUIVALENT) if m.parameters.fewer]
    frugal = min(as_good, key=lambda m: (_size(m), _loss(rule, m)), default=None)
    baseline = next((m for m in able if m.label == rule.baseline), None)
    winner = best or frugal or baseline
    decision = sentence("champion", rule=rule, best=best, frugal=frugal, baseline=baseline, barred=barred)
    return NO_WINNER if winner is None else winner.label, decision


def read_with(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, ...]:
    """Return the notes, one a sentence or two."""
    return _paragraphs("notes", rule=rule, differences=[m.difference for m in methods if m.difference is not None])


def retained_notes(sources: Sequence[RetainedSource], methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, ...]:
    """Return the notes on what was forgotten and how it was measured; empty without retained data."""
    if not sources:
        return ()
    changes = [found.forgotten for method in methods for found in method.forgetting.values()]
    return _paragraphs("retained", rule=rule, sources=sources, intervals=[change.interval for change in changes])
