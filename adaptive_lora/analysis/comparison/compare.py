"""The comparison of a study: choose rates, pair seeds, test, correct, judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptive_lora.analysis.comparison import inference
from adaptive_lora.analysis.comparison.allocations import agreements, budget_maps
from adaptive_lora.analysis.comparison.efficiency import early_rate, front_areas, fronts
from adaptive_lora.analysis.comparison.fairness import audit
from adaptive_lora.analysis.comparison.findings import RetainedSource, VerdictKind
from adaptive_lora.analysis.comparison.forgetting import (
    UNBOUNDED,
    ForgettingBound,
    bar,
    measure_forgetting,
    retained_sources,
)
from adaptive_lora.analysis.comparison.inference import Rule
from adaptive_lora.analysis.comparison.looks import SeedPlan
from adaptive_lora.analysis.comparison.outcome import Margin, Outcome, Replicate
from adaptive_lora.analysis.comparison.pairing import PairedSeed, base_model_loss, own_values, pair_seeds
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
)
from adaptive_lora.analysis.comparison.verdict import choose_winner, headline, judge, read_with, retained_notes
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
    retained: Sequence[str] | None = None,
    bound: ForgettingBound = UNBOUNDED,
    seed: int = 0,
    outcome: Outcome | None = None,
    over: Replicate = "seed",
    plan: SeedPlan | None = None,
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
        retained: digests of the retained data to measure forgetting on; None: all that trials were scored on.
        bound: the most that the champion may forget of any of them.
        seed: seed of the bootstrap; the same one gives the same numbers.
        outcome: the number that is compared; None: the test loss, in the unit of the records.
        over: `seed`, or `example` for one run per method: tests and intervals are then over the
            test examples, and say nothing about other seeds.
        plan: seeds by look, where they are added until the comparisons are decided; p and intervals then hold over
            all looks; trials of other seeds, or of a method after the look that decided it, do not count, and rates
            are chosen by the first look's seeds. Requires `holm`.

    Raises:
        DataError: no such baseline, it has no finished seed, or trials of one pair were scored on
            different examples.
        ConfigError: there is a bound on forgetting and no trial has scores on retained data.
    """
    if plan is not None:
        records = [record for record in records if record.seed in plan.expected(record.method)]
    case = open_case(
        records,
        Rule(
            baseline=baseline,
            alpha=round(1 - confidence, 12),
            confidence=confidence,
            correction=correction,
            comparisons=0,
            margin=Margin(value=margin, source=""),
            outcome=outcome or Outcome(unit=unit_of(records)),
            over=over,
            seed=seed,
            plan=plan,
        ),
        base_scores=base_scores,
        margin_share=margin_share,
    )
    corrected = inference.correct(case.differences(), case.replicates(), seed)
    return conclude(case, corrected, facts or {}, retained=retained, bound=bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Trials of one comparison, sorted and paired, before any test."""

    table: TrialTable
    rule: Rule
    rates: Mapping[str, tuple[LearningRate, ...]]
    """Method -> its learning rates, one of them chosen where any seed finished."""
    base: Mapping[int, Folds]
    """Seed -> trials of the baseline at its own best rate."""
    pairs: Mapping[str, Sequence[PairedSeed]]
    """Method -> its paired seeds, of the methods that have any."""
    frozen_loss: float | None

    def rate(self, label: str) -> float | None:
        """Return a method's chosen learning rate; None where no seed finished, or where it is not known."""
        return next((rate.lr for rate in self.rates[label] if rate.chosen), None)

    def differences(self) -> dict[str, Difference]:
        """Return the difference of each method to the baseline, without correction."""
        base_lr = self.rate(self.rule.baseline)
        return {
            label: inference.measure(found, self.rate(label), base_lr, self.rule) for label, found in self.pairs.items()
        }

    def replicates(self) -> dict[str, dict[Any, float]]:
        """Return the differences by replicate that `inference.correct` needs."""
        return {label: inference.replicates(found, self.rule) for label, found in self.pairs.items()}


def open_case(
    records: Sequence[TrialRecord],
    rule: Rule,
    *,
    base_scores: EvalResult | Mapping[int, EvalResult] | None = None,
    margin_share: float = 0.01,
) -> Case:
    """Sort trials, choose rates and pair seeds; the arguments are those of `compare`.

    The rule's number of comparisons is filled in, and its margin where it has no value.
    """
    baseline, outcome = rule.baseline, rule.outcome
    table = tabulate(records, baseline)
    first = None if rule.plan is None else rule.plan.added[0]
    rates = {label: choose_rate(table, label, outcome, first) for label in table.methods}
    chosen = {label: next((rate.lr for rate in curve if rate.chosen), None) for label, curve in rates.items()}
    base = table.seeds_at(baseline, chosen[baseline])
    if not base:
        reasons = sorted({failure.reason for failure in table.failures.get(baseline, ())})
        raise DataError(
            f"baseline {baseline} has no seed of which every fold finished: "
            f"{'; '.join(reasons) or 'folds are missing'}."
        )
    paired = {m: pair_seeds(table.seeds_at(m, chosen[m]), base) for m in table.methods if m != baseline}
    pairs = {label: found for label, found in paired.items() if found}
    frozen_loss = base_model_loss(base_scores, base)
    given, plan = rule.margin.value, rule.plan
    if given is None and plan is not None and plan.margin is not None:
        margin = plan.margin
    else:
        margin = inference.choose_margin(
            given, margin_share, frozen_loss, over_seeds(base, loss_of, "").mean, outcome.unit
        )
    rule = replace(rule, comparisons=len(pairs), margin=margin)
    return Case(table=table, rule=rule, rates=rates, base=base, pairs=pairs, frozen_loss=frozen_loss)


def conclude(
    case: Case,
    best: Mapping[str, Difference],
    facts: Mapping[str, str],
    *,
    retained: Sequence[str] | None = None,
    bound: ForgettingBound = UNBOUNDED,
) -> Comparison:
    """Return verdicts on differences whose p-values are corrected, and the answer of all.

    Args:
        case: the trials.
        best: method -> its difference at its own best rate.
        facts: as in `compare`, as are the two arguments that follow.
        retained: see there.
        bound: see there.
    """
    against = _Against(
        best=best,
        shared=_shared_rate(case, best),
        scores=inference.correct_scores({m: inference.exact_match_difference(case.pairs[m], case.rule) for m in best}),
    )
    used = {label: case.table.seeds_at(label, case.rate(label)) for label in case.table.methods}
    sources = retained_sources(used, retained, bound)
    methods = tuple(_summary(case, label, against) for label in case.table.methods)
    methods = tuple(_with_forgetting(method, used[method.label], case, sources) for method in methods)
    return _conclusion(case, methods, sources, facts)


def _shared_rate(case: Case, best: Mapping[str, Difference]) -> Mapping[str, Difference]:
    """Return the differences with every method at the baseline's rate, corrected on their own."""
    base_lr, rule = case.rate(case.rule.baseline), case.rule
    if all(difference.lr == base_lr for difference in best.values()):
        return best
    base = case.table.seeds_at(rule.baseline, base_lr)
    paired = {label: pair_seeds(case.table.seeds_at(label, base_lr), base) for label in best}
    known = {label: pairs for label, pairs in paired.items() if pairs}
    found = {
        label: best[label] if best[label].lr == base_lr else inference.measure(pairs, base_lr, base_lr, rule)
        for label, pairs in known.items()
    }
    replicates = {label: inference.replicates(pairs, rule) for label, pairs in known.items()}
    return inference.correct(found, replicates, rule.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Against:
    """Differences to the baseline by label of the method."""

    best: Mapping[str, Difference]
    shared: Mapping[str, Difference]
    scores: Mapping[str, ScoreDifference]


def _summary(case: Case, label: str, against: _Against) -> MethodSummary:
    """Return a method's own numbers, and its comparison with the baseline with the verdict on it."""
    table, base, rule, lr = case.table, case.base, case.rule, case.rate(label)
    trials = table.seeds_at(label, lr)
    failures = tuple(table.failures.get(label, ()))
    expected = table.seeds if rule.plan is None else rule.plan.expected(label)
    parameters = _parameters(trials, base)
    interval = Interval.missing("no seed finished")
    if losses := own_values(trials) if rule.over == "example" else list(per_seed(trials, loss_of).values()):
        interval = mean_interval(losses, confidence=rule.confidence, seed=rule.seed, over=rule.over)
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
        rates=case.rates[label],
        seeds=tuple(trials),
        missing_seeds=tuple(seed for seed in expected if seed not in trials),
        failures=failures,
        loss_interval=interval,
        parameters=parameters,
        difference=difference,
        shared_rate=against.shared.get(label),
        exact_match_difference=against.scores.get(label),
        most_changed=inference.most_changed(case.pairs.get(label, ()), rule.outcome),
        early_rate=early_rate(trials, base, rule.confidence, rule.seed),
        further=_further(trials),
        verdict=verdict,
        forgetting={},
        barred="",
        **_scores(trials),
    )


def _with_forgetting(
    method: MethodSummary, trials: Mapping[int, Folds], case: Case, sources: Sequence[RetainedSource]
) -> MethodSummary:
    """Return a method with what it forgot of each source, and why it cannot be champion, if that is too much."""
    if not sources:
        return method
    found = {
        source.name: measure_forgetting(
            trials, case.base, source, case.rule, is_baseline=method.label == case.rule.baseline
        )
        for source in sources
    }
    forgetting = {name: one for name, one in found.items() if one is not None}
    barred = bar(forgetting, sources, case.rule)
    text = f"{method.verdict.text} Not eligible as champion: {barred}." if barred else method.verdict.text
    return replace(method, forgetting=forgetting, barred=barred, verdict=replace(method.verdict, text=text))


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
        "covering_rank": (metric("profile/covering_rank"), "no profile with a noise edge"),
    }
    absent = "" if trials else "no seed finished"
    return {name: over_seeds(trials, read, absent or missing) for name, (read, missing) in readers.items()}


def _parameters(trials: Mapping[int, Folds], base: Mapping[int, Folds]) -> Parameters:
    counts, base_counts = (
        [r.trainable_parameters for folds in seeds.values() for r in folds if r.trainable_parameters is not None]
        for seeds in (trials, base)
    )
    if not counts:
        return Parameters(mean=None, least=None, most=None, difference=0.0, share=None)
    mean = float(np.mean(counts))
    base_mean = float(np.mean(base_counts)) if base_counts else mean
    return Parameters(
        mean=mean,
        least=min(counts),
        most=max(counts),
        difference=mean - base_mean,
        share=(mean - base_mean) / base_mean if base_counts and base_mean else None,
    )


def _conclusion(
    case: Case, methods: tuple[MethodSummary, ...], sources: tuple[RetainedSource, ...], facts: Mapping[str, str]
) -> Comparison:
    """Put the verdicts of all methods into one answer."""
    table, rule, frozen_loss = case.table, case.rule, case.frozen_loss
    answer, remarks = headline(methods, rule)
    winner, decision = choose_winner(methods, rule)
    return Comparison(
        answer=answer,
        remarks=remarks,
        audit=audit(table, methods),
        notes=(*read_with(methods, rule), *retained_notes(sources, methods, rule)),
        baseline=rule.baseline,
        winner=winner,
        decision=decision,
        methods=methods,
        margin=rule.margin,
        frozen_loss=frozen_loss,
        confidence=rule.confidence,
        correction=rule.correction,
        trials=table.trials,
        failed_trials=sum(map(len, table.failures.values())),
        raced_rates=len(table.raced),
        fronts=fronts(table, methods, rule.outcome, rule.seed),
        areas=front_areas(table, methods, frozen_loss=frozen_loss, confidence=rule.confidence, seed=rule.seed),
        agreements=agreements(table, methods),
        budgets=budget_maps(table, methods),
        unit=rule.unit,
        outcome=rule.outcome,
        over=rule.over,
        tasks=(),
        facts=dict(facts),
        looks=() if rule.plan is None else rule.plan.earlier,
        retained=sources,
    )
