"""The comparison of a study: choose rates, pair seeds, test, correct, judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptive_lora.analysis.comparison import inference
from adaptive_lora.analysis.comparison.allocations import agreements, budget_maps
from adaptive_lora.analysis.comparison.efficiency import early_rate, front_areas, fronts
from adaptive_lora.analysis.comparison.fairness import audit
from adaptive_lora.analysis.comparison.inference import Rule
from adaptive_lora.analysis.comparison.pairing import PairedSeed, base_model_loss, pair_seeds
from adaptive_lora.analysis.comparison.trials import (
    Folds,
    Reader,
    TrialTable,
    choose_rate,
    loss_of,
    metric,
    over_seeds,
    per_seed,
    tabulate,
    trained_parameters,
    unit_of,
)
from adaptive_lora.analysis.comparison.types import (
    Comparison,
    Difference,
    LearningRate,
    MethodSummary,
    Parameters,
    ScoreDifference,
    SeedMean,
    Verdict,
    VerdictKind,
)
from adaptive_lora.analysis.comparison.verdict import choose_winner, headline, judge, read_with
from adaptive_lora.analysis.stats import Correction, Interval, mean_interval
from adaptive_lora.errors import DataError
from adaptive_lora.results import EvalResult, TrialRecord


def compare(
    records: Sequence[TrialRecord],
    *,
    baseline: str,
    base_scores: EvalResult | Mapping[int, EvalResult] | None = None,
    margin: float | None = None,
    margin_share: float = 0.01,
    confidence: float = 0.95,
    correction: Correction = "holm",
    facts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare every method with the baseline in test loss, paired by seed.

    Each method is taken at its own best learning rate by validation loss. Folds are averaged
    within a seed; a seed counts where all folds finished under both methods.

    Args:
        records: trials of one study, finished and failed, in any order.
        baseline: label of the method that the others are compared with.
        base_scores: scores of the base model without adapter on the same test part, or one per fold.
        margin: largest difference in test loss, in its own unit, that does not matter.
        margin_share: the margin where none is given: this share of the baseline's gain over
            the frozen base.
        confidence: that of all intervals; tests use 1 - confidence as their level.
        correction: which p decides when several methods are compared. `holm` needs 8 seeds for 5
            comparisons, `max_t` (Westfall & Young) 6 for any number; `benjamini_hochberg` is for
            screening.
        facts: how to reproduce, passed on as given.
        seed: seed of the bootstrap; the same one gives the same numbers.

    Raises:
        DataError: no such baseline, it has no finished seed, or trials of one pair were scored on
            different examples.
    """
    table = tabulate(records, baseline)
    unit = unit_of(records)
    rates = {label: choose_rate(table, label) for label in table.methods}
    chosen = {label: next((rate.lr for rate in curve if rate.chosen), None) for label, curve in rates.items()}
    base_lr = chosen[baseline]
    if base_lr is None:
        reasons = sorted({failure.reason for failure in table.failures if failure.method == baseline})
        raise DataError(
            f"baseline {baseline} has no seed of which every fold finished: "
            f"{'; '.join(reasons) or 'folds are missing'}."
        )
    base = table.seeds_at(baseline, base_lr)
    others = [label for label in table.methods if label != baseline]
    pairs = {label: pair_seeds(table.seeds_at(label, chosen[label]), base) for label in others}
    compared = [label for label in others if pairs[label]]
    frozen_loss = base_model_loss(base_scores, base)
    rule = Rule(
        baseline=baseline,
        alpha=round(1 - confidence, 12),
        confidence=confidence,
        correction=correction,
        comparisons=len(compared),
        margin=inference.choose_margin(margin, margin_share, frozen_loss, over_seeds(base, loss_of, "").mean, unit),
        unit=unit,
        seed=seed,
    )
    best = inference.correct({m: inference.measure(pairs[m], chosen[m] or 0.0, base_lr, rule) for m in compared}, seed)
    shared = _shared_rate(table, base_lr, best, rule)
    scores = inference.correct_scores({m: inference.exact_match_difference(pairs[m], rule) for m in compared})
    against = _Against(best=best, shared=shared, scores=scores, pairs=pairs)
    methods = tuple(_summary(table, label, rates[label], base, against, rule) for label in table.methods)
    return _conclusion(table, methods, rule, frozen_loss, facts or {})


def _shared_rate(
    table: TrialTable, base_lr: float, best: Mapping[str, Difference], rule: Rule
) -> Mapping[str, Difference]:
    """Return the differences with every method at the baseline's rate, corrected on their own."""
    base = table.seeds_at(table.methods[0], base_lr)
    found: dict[str, Difference] = {}
    for label, difference in best.items():
        if difference.lr == base_lr:
            found[label] = difference
        elif pairs := pair_seeds(table.seeds_at(label, base_lr), base):
            found[label] = inference.measure(pairs, base_lr, base_lr, rule)
    return inference.correct(found, rule.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Against:
    """Differences to the baseline by label of the method, and the pairs that they are from."""

    best: Mapping[str, Difference]
    shared: Mapping[str, Difference]
    scores: Mapping[str, ScoreDifference]
    pairs: Mapping[str, Sequence[PairedSeed]]


def _summary(
    table: TrialTable,
    label: str,
    rates: tuple[LearningRate, ...],
    base: Mapping[int, Folds],
    against: _Against,
    rule: Rule,
) -> MethodSummary:
    """Return a method's own numbers, and its comparison with the baseline with the verdict on it."""
    lr = next((rate.lr for rate in rates if rate.chosen), None)
    trials = table.seeds_at(label, lr)
    failures = tuple(failure for failure in table.failures if failure.method == label)
    parameters = _parameters(trials, base)
    interval = Interval.missing("no seed finished")
    if losses := list(per_seed(trials, loss_of).values()):
        interval = mean_interval(losses, confidence=rule.confidence, seed=rule.seed)
    difference = against.best.get(label)
    if difference is not None:
        verdict = judge(difference, parameters, rule)
        if verdict.kind is VerdictKind.INCONCLUSIVE:
            difference = replace(difference, power=inference.power_answers(difference, rule))
            verdict = judge(difference, parameters, rule)
    elif label == rule.baseline:
        verdict = Verdict(kind=VerdictKind.BASELINE, text="baseline: the others are compared with it.")
    else:
        reason = "no seed in common with the baseline" if trials else "no seed finished"
        failed = f", {len(failures)} failed" if failures else ""
        verdict = Verdict(kind=VerdictKind.NOT_COMPARED, text=f"not compared: {reason}{failed}.")
    return MethodSummary(
        label=label,
        lr=lr,
        rates=rates,
        seeds=tuple(trials),
        missing_seeds=tuple(seed for seed in table.seeds if seed not in trials),
        failures=failures,
        loss_interval=interval,
        parameters=parameters,
        difference=difference,
        shared_rate=against.shared.get(label),
        exact_match_difference=against.scores.get(label),
        most_changed=inference.most_changed(against.pairs.get(label, ())),
        early_rate=early_rate(trials, base, rule.confidence, rule.seed),
        further=_further(trials),
        verdict=verdict,
        **_scores(trials),
    )


def _further(trials: Mapping[int, Folds]) -> dict[str, SeedMean]:
    """Return other scores of the task by name; accuracy has a field of its own."""
    tests = [record.test for folds in trials.values() for record in folds if record.test is not None]
    names = dict.fromkeys(name for test in tests for name in test.others if name != "accuracy")

    def reader(name: str) -> Reader:
        return lambda record: None if record.test is None else record.test.others.get(name)

    return {name: over_seeds(trials, reader(name), "not scored") for name in names}


def _scores(trials: Mapping[int, Folds]) -> dict[str, SeedMean]:
    """Return every score of `MethodSummary` that is a mean over seeds, by field name."""
    metrics = ("reduction_vs_full", "efficiency_ratio", "tokens_per_second", "train_seconds", "peak_memory_bytes")
    readers: dict[str, tuple[Reader, str]] = {
        "loss": (loss_of, ""),
        "perplexity": (lambda r: r.test.perplexity if r.test else None, ""),
        "token_accuracy": (lambda r: r.test.token_accuracy if r.test else None, ""),
        "exact_match": (lambda r: r.test.exact_match if r.test else None, "not scored"),
        **{name: (metric(name), "not recorded") for name in metrics},
        "trained_parameters": (trained_parameters, ""),
        "profile_stability": (metric("profile/stability"), "no profile measured"),
    }
    absent = "" if trials else "no seed finished"
    return {name: over_seeds(trials, read, absent or missing) for name, (read, missing) in readers.items()}


def _parameters(trials: Mapping[int, Folds], base: Mapping[int, Folds]) -> Parameters:
    counts, base_counts = (
        [record.trainable_parameters for folds in seeds.values() for record in folds] for seeds in (trials, base)
    )
    if not counts:
        return Parameters(mean=None, least=None, most=None, difference=0.0, share=None)
    mean, base_mean = float(np.mean(counts)), float(np.mean(base_counts))
    return Parameters(
        mean=mean,
        least=min(counts),
        most=max(counts),
        difference=mean - base_mean,
        share=(mean - base_mean) / base_mean if base_mean else None,
    )


def _conclusion(
    table: TrialTable,
    methods: tuple[MethodSummary, ...],
    rule: Rule,
    frozen_loss: float | None,
    facts: Mapping[str, str],
) -> Comparison:
    """Put the verdicts of all methods into one answer."""
    answer, remarks = headline(methods, rule)
    winner, decision = choose_winner(methods, rule)
    return Comparison(
        answer=answer,
        remarks=remarks,
        audit=audit(table, methods),
        notes=read_with(methods, rule),
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
        raced_rates=len(table.raced),
        fronts=fronts(table, methods, rule.seed),
        areas=front_areas(table, methods, frozen_loss=frozen_loss, confidence=rule.confidence, seed=rule.seed),
        agreements=agreements(table, methods),
        budgets=budget_maps(table, methods),
        unit=rule.unit,
        facts=dict(facts),
    )
