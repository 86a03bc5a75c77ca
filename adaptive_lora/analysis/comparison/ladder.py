"""Bound on what an allocation could win: uniform ranks at the budget, against uniform ranks with more parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import AuditKind, Ladder, Rung, VerdictKind
from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.analysis.comparison.types import Comparison, MethodSummary
from adaptive_lora.analysis.comparison.verdict import sentence
from adaptive_lora.analysis.comparison.wording import amount, interval_text, plural, signed
from adaptive_lora.analysis.stats import Correction, Interval


def with_ladder(comparison: Comparison, rungs: Comparison) -> Comparison:
    """Return the comparison of a study with its ladder, whose sentence begins the answer.

    Args:
        comparison: comparison of the study's own methods.
        rungs: comparison of uniform ranks, whose baseline has the budget's rank.
    """
    ladder = ladder_of(rungs)
    if ladder is None:
        note = f"What there is to win is not known: no rank above {rungs.baseline} finished under a seed that it did."
        return replace(comparison, notes=(note, *comparison.notes))
    answer = (ladder.text,) if len(comparison.methods) == 1 else (ladder.text, comparison.answer)
    return replace(comparison, ladder=ladder, answer=" ".join(answer))


def ladder_of(comparison: Comparison) -> Ladder | None:
    """Return the ladder of a comparison of uniform ranks, whose baseline has the budget's rank.

    None where no rung with more parameters could be compared.
    """
    methods = sorted(comparison.methods, key=lambda method: method.parameters.mean or 0.0)
    base = comparison.method(comparison.baseline)
    sign = comparison.outcome.sign
    larger = [m for m in methods if m.difference is not None and m.parameters.difference > 0]
    if not larger:
        return None
    best = min(larger, key=lambda method: sign * _mean(method))
    as_good = (VerdictKind.NON_INFERIOR, VerdictKind.BETTER)
    smaller = [m for m in methods if m.parameters.difference < 0 and m.verdict.kind in as_good]
    ends = _ends(best, comparison.outcome)
    shown = {
        "base": base,
        "best": best,
        "gain": -sign * _mean(best),
        "ends": Interval(low=ends[0], high=ends[1], method=""),
        "larger": larger,
        "same": all(method.verdict.kind is VerdictKind.EQUIVALENT for method in larger),
        "smallest": smaller[0] if smaller else None,
        "comparison": comparison,
    }
    return Ladder(
        text=sentence("ladder", **shown),
        warnings=(*_falling(larger, comparison), *_too_few(comparison), *_untuned(comparison)),
        base=base.label,
        best=best.label,
        rungs=tuple(_rung(method) for method in methods if method.parameters.mean is not None),
        low=ends[0],
        high=ends[1],
    )


def _mean(method: MethodSummary) -> float:
    assert method.difference is not None
    return method.difference.mean


def _ends(best: MethodSummary, outcome: Outcome) -> tuple[float | None, float | None]:
    """Return the least and the most that a rung wins."""
    assert best.difference is not None
    low, high = outcome.as_loss(best.difference.interval)
    return (None, None) if low is None or high is None else (-high, -low)


def _rung(method: MethodSummary) -> Rung:
    assert method.parameters.mean is not None
    assert method.loss.mean is not None
    difference = method.difference
    return Rung(
        method=method.label,
        parameters=method.parameters.mean,
        lr=method.lr,
        loss=method.loss.mean,
        difference=None if difference is None else difference.mean,
        interval=Interval.missing("the budget's own rung") if difference is None else difference.interval,
        verdict=method.verdict.kind,
    )


def _falling(larger: Sequence[MethodSummary], comparison: Comparison) -> list[str]:
    """Return a sentence for each step to more parameters that is shown to make the outcome worse."""
    found = []
    for less, more in pairwise([None, *larger]):
        assert more is not None
        before, after = _by_seed(less), _by_seed(more)
        shared = [seed for seed in after if less is None or seed in before]
        steps = [comparison.outcome.sign * (after[seed] - before.get(seed, 0.0)) for seed in shared]
        if len(steps) < 2:
            continue
        interval = stats.mean_interval(steps, confidence=comparison.confidence)
        if interval.low is not None and interval.low > 0:
            name = comparison.baseline if less is None else less.label
            by = amount(signed(sum(steps) / len(steps)), comparison.unit)
            found.append(
                f"{more.label} is worse than {name} by {by} {interval_text(interval)}: "
                "more rank is not better here at the rates of the grid, so the bound may be too low."
            )
    return found


def _by_seed(method: MethodSummary | None) -> dict[int, float]:
    """Return seed -> difference to the budget's rung; empty for that rung."""
    if method is None or method.difference is None:
        return {}
    return dict(zip(method.difference.seeds, method.difference.values, strict=True))


def _too_few(comparison: Comparison) -> list[str]:
    """Return whether there are too few seeds for any rung to be better."""
    found = [method.difference.replicates for method in comparison.methods if method.difference is not None]
    rule = cast(Correction, comparison.correction)
    required = stats.fewest_seeds(comparison.alpha, comparisons=len(found), correction=rule)
    if max(found) >= required:
        return []
    return [
        f"With {plural(max(found), 'seed')} no rung could have been shown to be better: "
        f"{plural(len(found), 'comparison')} of rungs need{'s' if len(found) == 1 else ''} {required} seeds."
    ]


def _untuned(comparison: Comparison) -> list[str]:
    """Return what is amiss with the learning rates of the rungs."""
    return [entry.text for entry in comparison.audit if entry.topic == "tuning" and entry.kind is AuditKind.BAD]
