"""Pairs to numbers: the rule that decides, the differences to the baseline and their tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import PowerAnswer
from adaptive_lora.analysis.comparison.looks import SeedPlan
from adaptive_lora.analysis.comparison.outcome import Margin, Outcome, Replicate
from adaptive_lora.analysis.comparison.pairing import PairedSeed
from adaptive_lora.analysis.comparison.types import Difference, ExampleChange, MarginTests, ScoreDifference, Tests
from adaptive_lora.analysis.comparison.wording import plain
from adaptive_lora.analysis.stats import Correction, Interval, Looks, attainable_p, fewest_seeds
from adaptive_lora.errors import DataError
from adaptive_lora.results import NATS_PER_TOKEN, FloatArray

SHOWN_EXAMPLES = 3
"""Most changed examples kept per direction."""
POWER = 0.8
"""Power that the number of seeds asked for has to give."""
_MOST_EXAMPLES = 10_000_000
"""Number of test examples above which no number is given."""


def one_sided(confidence: float) -> float:
    """Return the confidence of the interval whose ends are one-sided tests at 1 - confidence."""
    return round(2 * confidence - 1, 12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Level, correction and margin that decide, the same for all methods of a comparison."""

    baseline: str
    alpha: float
    confidence: float
    correction: Correction
    comparisons: int
    margin: Margin
    outcome: Outcome = field(default_factory=Outcome)
    over: Replicate = "seed"
    """Unit of inference; `example` where there is one run per method."""
    seed: int = 0
    """Seed of the resampling."""
    plan: SeedPlan | None = None
    """Seeds by look, where they are added until the comparisons are decided; None: all were planned at once."""

    @property
    def alpha_each(self) -> float:
        """Level of the first step of the correction, the strictest of all."""
        return self.alpha if self.correction == "max_t" else self.alpha / max(1, self.comparisons)

    def corrected(self, difference: Difference) -> float:
        """Return the corrected p that decides."""
        return float(getattr(difference.tests, self.correction))

    @property
    def unit(self) -> str:
        """Unit of the outcome."""
        return self.outcome.unit

    def least_corrected(self, seeds: int) -> float:
        """Return the least corrected p that so many seeds can reach for the best method.

        Only Holm raises it; that of Benjamini and Hochberg stays where all methods reach it.
        """
        factor = max(1, self.comparisons) if self.correction == "holm" else 1
        return min(1.0, factor * self.attainable(seeds))

    def attainable(self, seeds: int) -> float:
        """Return the least p that so many seeds can reach before any correction."""
        if self.plan is None:
            return attainable_p(seeds)
        return Looks(most=self.plan.most, planned=(seeds,), seeds=(seeds,)).attainable_p

    @property
    def seeds_required(self) -> int:
        """Seeds at which a corrected p can reach alpha at all."""
        if self.plan is not None:
            return next((n for n in range(1, self.plan.most) if self.least_corrected(n) <= self.alpha), self.plan.most)
        return fewest_seeds(self.alpha, comparisons=self.comparisons, correction=self.correction)


def choose_margin(
    given: float | None, share: float, frozen_loss: float | None, base_loss: float | None, unit: str = NATS_PER_TOKEN
) -> Margin:
    """Return the margin.

    Args:
        given: margin from the user, in the unit of the loss; used instead of the share.
        share: share of the baseline's gain over the frozen base in test loss.
        frozen_loss: test loss of the base without adapter, where known.
        base_loss: test loss of the baseline.
        unit: unit of the losses.

    Raises:
        DataError: not above 0.
    """
    if given is not None:
        if given <= 0:
            raise DataError(f"margin: required above 0 {unit}".rstrip() + f", got {given:g}.")
        return Margin(value=given, source=f"given, in {unit or 'the unit of the score'}")
    if frozen_loss is None or base_loss is None:
        return Margin(
            value=None,
            source="no margin given and no score of the frozen base to take one from: equivalence is not tested",
        )
    gain = frozen_loss - base_loss
    if gain <= 0:
        return Margin(
            value=None,
            source="the baseline gains nothing over the frozen base, so no margin follows from it: "
            "equivalence is not tested",
        )
    return Margin(
        value=share * gain,
        source=f"{100 * share:g} % of what the baseline gains over the frozen base "
        f"({plain(frozen_loss)} to {plain(base_loss)} {unit})",
    )


def replicates(pairs: Sequence[PairedSeed], rule: Rule) -> dict[Any, float]:
    """Return seed -> difference; over examples: (fold, example id) -> its share of the difference, whose mean it is."""
    if rule.over == "seed":
        return {pair.seed: pair.loss for pair in pairs}
    (pair,) = pairs
    scale_E = pair.fold_scale_E / np.mean(pair.tokens_E * pair.fold_scale_E)
    names = zip(pair.folds_E.tolist(), pair.ids_E.tolist(), strict=True)
    return dict(zip(names, (pair.nll_E * scale_E).tolist(), strict=True))


def measure(pairs: Sequence[PairedSeed], lr: float | None, baseline_lr: float | None, rule: Rule) -> Difference:
    """Return the difference over at least one paired seed; corrected p-values come later."""
    value_S = tuple(float(pair.loss) for pair in pairs)
    by_replicate = replicates(pairs, rule)
    diff_S = np.array(list(by_replicate.values()))
    higher = rule.outcome.higher_is_better
    rows = ([pair.nll_E * pair.fold_scale_E for pair in pairs], [pair.tokens_E * pair.fold_scale_E for pair in pairs])
    crossed = same_examples(pairs)
    found = _at_once(diff_S, rule) if rule.plan is None else _over_looks(by_replicate, rule.plan, rule)
    return Difference(
        lr=lr,
        baseline_lr=baseline_lr,
        seeds=tuple(pair.seed for pair in pairs),
        values=value_S,
        replicates=diff_S.size,
        mean=float(np.mean(value_S)),
        sd=float(diff_S.std(ddof=1)) if diff_S.size > 1 else None,
        interval=found.interval,
        hierarchical=(
            stats.two_way_interval(*rows, crossed=crossed, confidence=rule.confidence, seed=rule.seed)
            if pairs[0].ids_E.size > 1
            else Interval.missing("no scores of single examples")
        ),
        effect=stats.paired_effect(diff_S, confidence=rule.confidence, higher_is_better=higher, over=rule.over),
        tests=Tests(
            sign_flip=found.p,
            attainable=found.attainable,
            holm=found.p,
            benjamini_hochberg=found.p,
            max_t=None if rule.plan else found.p,
            wilcoxon=stats.wilcoxon(diff_S),
            paired_t=stats.paired_t(diff_S),
            normality=stats.normality(diff_S),
            symmetry=stats.symmetry(diff_S),
        ),
        margin_tests=found.margin_tests,
        components=stats.variance_components(*rows, crossed=crossed),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decisive:
    """The numbers of a difference that its verdict rests on, before correction."""

    p: float
    attainable: float
    interval: Interval
    margin_tests: MarginTests | None


def _at_once(diff_S: FloatArray, rule: Rule) -> _Decisive:
    """Test differences of which all replicates were planned beforehand."""
    margin = rule.margin.value
    interval = partial(stats.mean_interval, diff_S, seed=rule.seed, over=rule.over)
    loss_S = rule.outcome.sign * diff_S  # lower is better
    return _Decisive(
        p=stats.sign_flip_test(diff_S, seed=rule.seed),
        attainable=attainable_p(diff_S.size),
        interval=interval(confidence=rule.confidence),
        margin_tests=None
        if margin is None
        else MarginTests(
            interval=interval(confidence=one_sided(rule.confidence)),
            noninferior=stats.noninferiority_test(loss_S, margin),
            equivalent=stats.equivalence_test(loss_S, margin),
            equivalent_t=stats.equivalence_t_test(loss_S, margin),
        ),
    )


def _over_looks(differences: Mapping[int, float], plan: SeedPlan, rule: Rule) -> _Decisive:
    """Test differences that were looked at while seeds were added."""
    ordered, looks = plan.in_order(differences)
    values_S, margin = np.array(ordered), rule.margin.value
    loss_S = rule.outcome.sign * values_S
    tests = None
    if margin is not None:
        below = stats.sequential_p(loss_S - margin, looks, alternative="less")
        tests = MarginTests(
            interval=stats.repeated_interval(values_S, looks, confidence=one_sided(rule.confidence)),
            noninferior=below,
            equivalent=max(below, stats.sequential_p(loss_S + margin, looks, alternative="greater")),
            equivalent_t=None,
        )
    return _Decisive(
        p=stats.sequential_p(values_S, looks),
        attainable=looks.attainable_p,
        interval=stats.repeated_interval(values_S, looks, confidence=rule.confidence),
        margin_tests=tests,
    )


def same_examples(pairs: Sequence[PairedSeed]) -> bool:
    """Tell whether all seeds share one test part, as a split that ignores the seed gives."""
    first = pairs[0].ids_E
    return all(np.array_equal(pair.ids_E, first) for pair in pairs[1:])


Key = TypeVar("Key", bound=Hashable)


def correct(
    differences: Mapping[Key, Difference], replicates: Mapping[Key, Mapping[Any, float]], seed: int
) -> dict[Key, Difference]:
    """Return the differences with p-values corrected for the number of them.

    Args:
        differences: by method, or by task and method.
        replicates: seed, or example, -> its difference, of each; the same name is the same replicate.
        seed: seed of the resampling.
    """
    if not differences:
        return {}
    rows = list(differences.values())
    p_M = [row.tests.sign_flip for row in rows]
    own = [replicates[key] for key in differences]
    place = {name: at for at, name in enumerate(sorted({name for one in own for name in one}))}
    diff_SM = np.zeros((len(place), len(rows)))
    for column, one in enumerate(own):
        diff_SM[[place[name] for name in one], column] = list(one.values())
    corrected = zip(
        stats.holm(p_M), stats.benjamini_hochberg(p_M), stats.step_down_max_t(diff_SM, seed=seed), strict=True
    )
    tests = (
        replace(
            row.tests,
            holm=float(holm),
            benjamini_hochberg=float(bh),
            max_t=None if row.tests.max_t is None else float(max_t),
        )
        for row, (holm, bh, max_t) in zip(rows, corrected, strict=True)
    )
    return {key: replace(row, tests=one) for (key, row), one in zip(differences.items(), tests, strict=True)}


def exact_match_difference(pairs: Sequence[PairedSeed], rule: Rule) -> ScoreDifference | None:
    """Return the difference in exact match, or None where a pair has no such score."""
    known = [pair.exact_match for pair in pairs if pair.exact_match is not None]
    if not known or len(known) < len(pairs):
        return None
    match_SE = [pair.match_E for pair in pairs if pair.match_E is not None]
    p = stats.sign_flip_test(known, seed=rule.seed)
    return ScoreDifference(
        mean=float(np.mean(known)),
        interval=stats.mean_interval(known, confidence=rule.confidence, seed=rule.seed),
        hierarchical=stats.two_way_interval(
            match_SE,
            [np.ones_like(match_E) for match_E in match_SE],
            crossed=same_examples(pairs),
            confidence=rule.confidence,
            seed=rule.seed,
        ),
        superiority=stats.paired_effect([-gap for gap in known]).superiority,
        sign_flip=p,
        holm=p,
    )


def correct_scores(differences: Mapping[str, ScoreDifference | None]) -> dict[str, ScoreDifference]:
    """Return the differences in exact match with Holm's p over the methods that have one."""
    known = {label: row for label, row in differences.items() if row is not None}
    if not known:
        return {}
    holm_M = stats.holm([row.sign_flip for row in known.values()])
    return {label: replace(row, holm=float(p)) for (label, row), p in zip(known.items(), holm_M, strict=True)}


def most_changed(pairs: Sequence[PairedSeed], outcome: Outcome) -> tuple[ExampleChange, ...]:
    """Return the examples whose loss changed most, improved before worsened."""
    if not pairs or pairs[0].ids_E.size == 1 or not same_examples(pairs):
        return ()
    mean_E = np.mean([pair.nll_E for pair in pairs], axis=0)
    worse_E = outcome.sign * mean_E
    order = np.argsort(worse_E, kind="stable")
    lowest = [index for index in order[:SHOWN_EXAMPLES] if worse_E[index] < 0]
    highest = [index for index in order[::-1][:SHOWN_EXAMPLES] if worse_E[index] > 0]
    return tuple(
        ExampleChange(example_id=str(pairs[0].ids_E[index]), difference=float(mean_E[index]))
        for index in (*lowest, *highest)
    )


def power_answers(difference: Difference, rule: Rule) -> tuple[PowerAnswer, ...]:
    """Return the seeds and examples that would show the observed difference, and one of the margin's size."""
    parts, sd = difference.components, difference.sd
    if not sd:
        return ()
    answers = []
    for about, size in {"observed": abs(difference.mean), "margin": rule.margin.value}.items():
        if not size:
            continue
        if rule.over == "example":
            answers.append(_power_over_examples(about, size, sd, difference.replicates, rule))
            continue
        needed, simulated = stats.checked_seeds(
            size, sd, comparisons=rule.comparisons, correction=rule.correction, alpha=rule.alpha, power=POWER
        )
        now, least, seeds = 0.0, None, difference.replicates
        if seeds >= rule.seeds_required:
            now = stats.paired_power(size, sd, seeds, alpha=rule.alpha_each)
        if parts is not None and parts.example > 0:
            least = stats.examples_for_new_examples(size, parts, alpha=rule.alpha / max(1, rule.comparisons))
        answers.append(
            PowerAnswer(
                about=about,
                difference=size,
                seeds=seeds,
                examples=0 if parts is None else parts.examples,
                power=now,
                seeds_needed=needed,
                simulated_power=simulated,
                examples_needed=(
                    None if parts is None else stats.examples_for_power(size, parts, seeds, alpha=rule.alpha_each)
                ),
                examples_at_least=least,
            )
        )
    return tuple(answers)


def _power_over_examples(about: str, size: float, sd: float, examples: int, rule: Rule) -> PowerAnswer:
    """Return the examples that would show a difference of one run per method."""
    return PowerAnswer(
        about=about,
        difference=size,
        seeds=1,
        examples=examples,
        power=stats.paired_power(size, sd, examples, alpha=rule.alpha_each),
        seeds_needed=None,
        simulated_power=None,
        examples_needed=stats.seeds_for_power(size, sd, alpha=rule.alpha_each, power=POWER, most=_MOST_EXAMPLES),
        examples_at_least=None,
    )
