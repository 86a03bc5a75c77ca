"""The comparison of a study: choose rates, pair seeds, test, correct, judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from adaptive_lora import stats
from adaptive_lora.comparison.fairness import Tags, audit
from adaptive_lora.comparison.inference import (
    Settings,
    correct,
    exact_match_difference,
    measure,
    most_changed,
)
from adaptive_lora.comparison.pairing import PairedSeed, check_same_examples, pair_seeds
from adaptive_lora.comparison.summary import describe
from adaptive_lora.comparison.trials import (
    Folds,
    TrialTable,
    choose_rate,
    over_seeds,
    tabulate,
)
from adaptive_lora.comparison.types import (
    Comparison,
    Difference,
    LearningRate,
    Margin,
    MethodSummary,
)
from adaptive_lora.comparison.verdict import Rule, choose_winner, headline, judge
from adaptive_lora.comparison.wording import p_text, plain, plural
from adaptive_lora.errors import DataError
from adaptive_lora.results import EvalResult, TrialRecord

MARGIN_SHARE = 0.01
"""Default margin: this share of what the baseline gains over the frozen base in test loss."""


def compare(
    records: Sequence[TrialRecord],
    *,
    baseline: str,
    frozen: EvalResult | Mapping[int, EvalResult] | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    correction: Literal["holm", "max_t"] = "holm",
    tags: Tags | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare every method with the baseline in test loss, paired by seed.

    Each method stands at its own best learning rate by validation loss. Folds are averaged
    within a seed; a seed counts where all folds finished under both methods.

    Args:
        records: trials of one study, finished and failed, in any order.
        baseline: label of the method that the others are compared with.
        frozen: scores of the base model without adapter on the same test part, or one per fold.
        margin: largest difference in test loss (nats per supervised token) that does not matter.
        confidence: of all intervals; tests use 1 - confidence as their level.
        correction: which p decides when several methods are compared. `holm` needs 8 seeds for 5
            comparisons, `max_t` (Westfall & Young) 6 for any number.
        tags: run id -> tags, looked at by the fairness audit.
        seed: of the bootstrap; the same seed gives the same numbers.

    Raises:
        DataError: no such baseline, it has no finished seed, or trials of one pair were scored on
            different examples.
    """
    table = tabulate(records, baseline)
    rates = {label: choose_rate(table, label) for label in table.methods}
    chosen = {label: _chosen(curve) for label, curve in rates.items()}
    base_lr = chosen[baseline]
    if base_lr is None:
        raise _no_baseline(table)
    base = table.seeds_at(baseline, base_lr)
    others = [label for label in table.methods if label != baseline]
    pairs = {label: pair_seeds(table.seeds_at(label, chosen[label]), base) for label in others}
    compared = [label for label in others if pairs[label]]
    frozen_loss = _frozen_loss(frozen, base)
    rule = Rule(
        baseline=baseline,
        alpha=round(1 - confidence, 12),
        confidence=confidence,
        correction=correction,
        comparisons=len(compared),
        margin=_margin(margin, frozen_loss, _mean_loss(base)),
    )
    settings = _settings(rule, seed)
    found = {m: measure(pairs[m], chosen[m] or 0.0, base_lr, settings) for m in compared}
    best = correct(found, seed)
    shared = _shared_rate(table, compared, base_lr, best, settings)
    alone = [describe(table, m, rates[m], base, confidence, seed) for m in table.methods]
    methods = tuple(
        _complete(own, pairs.get(own.label, []), best, shared, rule, settings) for own in alone
    )
    return _conclusion(table, methods, rule, tags or {}, frozen_loss)


def _conclusion(
    table: TrialTable,
    methods: tuple[MethodSummary, ...],
    rule: Rule,
    tags: Tags,
    frozen_loss: float | None,
) -> Comparison:
    """Put the verdicts of all methods into one answer."""
    answer, remarks = headline(methods, rule)
    winner, decision = choose_winner(methods, rule)
    return Comparison(
        answer=answer,
        remarks=remarks,
        fairness=audit(table, methods, tags),
        notes=_notes(methods, rule),
        baseline=rule.baseline,
        winner=winner,
        decision=decision,
        methods=methods,
        margin=rule.margin,
        frozen_loss=frozen_loss,
        confidence=rule.confidence,
        correction=rule.correction,
        trials=table.trials,
        failed_trials=len(table.failures),
    )


def _settings(rule: Rule, seed: int) -> Settings:
    """Return the settings of each single comparison; Holm's first step has the strictest level."""
    each = rule.alpha if rule.correction == "max_t" else rule.alpha / max(1, rule.comparisons)
    return Settings(
        confidence=rule.confidence, margin=rule.margin.value, alpha_each=each, seed=seed
    )


def _no_baseline(table: TrialTable) -> DataError:
    baseline = table.methods[0]
    reasons = sorted({f.reason for f in table.failures if f.method == baseline})
    return DataError(
        f"baseline {baseline} has no seed of which every fold finished: "
        f"{'; '.join(reasons) or 'folds are missing'}."
    )


def _chosen(curve: Sequence[LearningRate]) -> float | None:
    return next((rate.lr for rate in curve if rate.chosen), None)


def _mean_loss(seeds: Mapping[int, Folds]) -> float:
    loss = over_seeds(seeds.values(), lambda r: r.test.loss if r.test else None, "").mean
    assert loss is not None  # every counted trial has a finite test loss
    return loss


def _frozen_loss(
    frozen: EvalResult | Mapping[int, EvalResult] | None, base: Mapping[int, Folds]
) -> float | None:
    """Return the frozen base's test loss, after checking that it saw the same examples."""
    if frozen is None:
        return None
    trials = next(iter(base.values()))
    if isinstance(frozen, EvalResult):
        ids = tuple(name for trial in trials if trial.test for name in trial.test.example_ids)
        check_same_examples(frozen.example_ids, ids, "frozen base and baseline")
        return frozen.loss
    missing = [trial.fold for trial in trials if trial.fold not in frozen]
    if missing:
        raise DataError(f"scores of the frozen base are missing for fold {missing[0]}.")
    for trial in trials:
        if trial.test:
            names = f"frozen base and baseline, fold {trial.fold}"
            check_same_examples(frozen[trial.fold].example_ids, trial.test.example_ids, names)
    return float(np.mean([frozen[trial.fold].loss for trial in trials]))


def _margin(given: float | None, frozen_loss: float | None, base_loss: float) -> Margin:
    if given is not None:
        if given <= 0:
            raise DataError(f"margin: required above 0 nats per token, got {given:g}.")
        return Margin(value=given, source="stated by the user, in nats per token")
    if frozen_loss is None:
        return Margin(
            value=None,
            source="no margin stated and no score of the frozen base to take one from: "
            "equivalence is not tested",
        )
    gain = frozen_loss - base_loss
    if gain <= 0:
        return Margin(
            value=None,
            source="the baseline gains nothing over the frozen base, so no margin follows from it: "
            "equivalence is not tested",
        )
    return Margin(
        value=MARGIN_SHARE * gain,
        source=f"{100 * MARGIN_SHARE:g} % of what the baseline gains over the frozen base "
        f"({plain(frozen_loss)} to {plain(base_loss)} nats per token)",
    )


def _shared_rate(
    table: TrialTable,
    compared: Sequence[str],
    base_lr: float,
    best: Mapping[str, Difference],
    settings: Settings,
) -> dict[str, Difference]:
    """Return the differences with every method at the baseline's rate, corrected on their own."""
    base = table.seeds_at(table.methods[0], base_lr)
    found: dict[str, Difference] = {}
    for label in compared:
        if best[label].lr == base_lr:
            found[label] = best[label]
            continue
        pairs = pair_seeds(table.seeds_at(label, base_lr), base)
        if pairs:
            found[label] = measure(pairs, base_lr, base_lr, settings)
    return correct(found, settings.seed)


def _complete(
    summary: MethodSummary,
    pairs: Sequence[PairedSeed],
    best: Mapping[str, Difference],
    shared: Mapping[str, Difference],
    rule: Rule,
    settings: Settings,
) -> MethodSummary:
    """Add to a method's own numbers what the comparison with the baseline gave."""
    difference = best.get(summary.label)
    if difference is None:
        return summary
    return dataclasses.replace(
        summary,
        difference=difference,
        shared_rate=shared.get(summary.label),
        exact_match_difference=exact_match_difference(pairs, settings),
        most_changed=most_changed(pairs),
        verdict=judge(difference, summary.parameters, rule),
    )


def _notes(methods: Sequence[MethodSummary], rule: Rule) -> tuple[str, ...]:
    """Return what the reader has to know to read the numbers."""
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
            f"corrected by {'Holm' if rule.correction == 'holm' else 'step-down max-T'}."
        )
    source = rule.margin.source
    if rule.margin.value is None:
        return (*notes, f"Margin: {source}.")
    return (
        *notes,
        f"Margin: {plain(rule.margin.value)} nats per token, {source}. Equivalence and "
        f"non-inferiority are one-sided tests at {100 * rule.alpha:g} % each, not corrected for "
        "several methods.",
    )
