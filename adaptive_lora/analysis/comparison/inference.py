"""Pairs to numbers: the rule that decides, the differences to the baseline and their tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.findings import PowerAnswer
from adaptive_lora.analysis.comparison.pairing import PairedSeed
from adaptive_lora.analysis.comparison.types import (
    Difference,
    ExampleChange,
    Margin,
    MarginTests,
    ScoreDifference,
    Tests,
)
from adaptive_lora.analysis.comparison.wording import plain
from adaptive_lora.analysis.stats import Correction, attainable_p, fewest_seeds
from adaptive_lora.errors import DataError
from adaptive_lora.results import NATS_PER_TOKEN, FloatArray

SHOWN_EXAMPLES = 3
"""Most changed examples kept per direction."""
POWER = 0.8
"""Power that the number of seeds asked for has to give."""


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
    unit: str = NATS_PER_TOKEN
    """Unit of the losses."""
    seed: int = 0
    """Seed of the resampling."""

    @property
    def alpha_each(self) -> float:
        """Level of the first step of the correction, the strictest of all."""
        return self.alpha if self.correction == "max_t" else self.alpha / max(1, self.comparisons)

    def corrected(self, difference: Difference) -> float:
        """Return the corrected p that decides."""
        return float(getattr(difference.tests, self.correction))

    def least_corrected(self, seeds: int) -> float:
        """Return the least corrected p that so many seeds can reach for the best method.

        Only Holm raises it; that of Benjamini and Hochberg stays where all methods reach it.
        """
        factor = max(1, self.comparisons) if self.correction == "holm" else 1
        return min(1.0, factor * attainable_p(seeds))

    @property
    def seeds_required(self) -> int:
        """Seeds at which a corrected p can reach alpha at all."""
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
            raise DataError(f"margin: required above 0 {unit}, got {given:g}.")
        return Margin(value=given, source=f"given by the user, in {unit}")
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


def measure(pairs: Sequence[PairedSeed], lr: float, baseline_lr: float, rule: Rule) -> Difference:
    """Return the difference over at least one paired seed; corrected p-values come later."""
    diff_S = np.array([pair.loss for pair in pairs])
    rows = ([pair.nll_E * pair.fold_scale_E for pair in pairs], [pair.tokens_E * pair.fold_scale_E for pair in pairs])
    crossed = _same_examples(pairs)
    p = stats.sign_flip_test(diff_S, seed=rule.seed)
    return Difference(
        lr=lr,
        baseline_lr=baseline_lr,
        seeds=tuple(pair.seed for pair in pairs),
        values=tuple(map(float, diff_S)),
        mean=float(diff_S.mean()),
        sd=float(diff_S.std(ddof=1)) if diff_S.size > 1 else None,
        interval=stats.mean_interval(diff_S, confidence=rule.confidence, seed=rule.seed),
        hierarchical=stats.two_way_interval(*rows, crossed=crossed, confidence=rule.confidence, seed=rule.seed),
        effect=stats.paired_effect(diff_S, confidence=rule.confidence),
        tests=Tests(
            sign_flip=p,
            attainable=attainable_p(diff_S.size),
            holm=p,
            benjamini_hochberg=p,
            max_t=p,
            wilcoxon=stats.wilcoxon(diff_S),
            paired_t=stats.paired_t(diff_S),
            normality=stats.normality(diff_S),
            symmetry=stats.symmetry(diff_S),
        ),
        margin_tests=_margin_tests(diff_S, rule),
        components=stats.variance_components(*rows, crossed=crossed),
    )


def _margin_tests(diff_S: FloatArray, rule: Rule) -> MarginTests | None:
    margin = rule.margin.value
    if margin is None:
        return None
    return MarginTests(
        interval=stats.mean_interval(diff_S, confidence=one_sided(rule.confidence), seed=rule.seed),
        noninferior=stats.noninferiority_test(diff_S, margin),
        equivalent=stats.equivalence_test(diff_S, margin),
        equivalent_t=stats.equivalence_t_test(diff_S, margin),
    )


def _same_examples(pairs: Sequence[PairedSeed]) -> bool:
    """Tell whether all seeds share one test part, as a split that ignores the seed gives."""
    first = pairs[0].ids_E
    return all(np.array_equal(pair.ids_E, first) for pair in pairs[1:])


def correct(differences: Mapping[str, Difference], seed: int) -> dict[str, Difference]:
    """Return the differences with p-values corrected for the number of methods compared."""
    if not differences:
        return {}
    rows = list(differences.values())
    p_M = [row.tests.sign_flip for row in rows]
    seeds = sorted({one for row in rows for one in row.seeds})
    diff_SM = np.zeros((len(seeds), len(rows)))
    for column, row in enumerate(rows):
        diff_SM[[seeds.index(one) for one in row.seeds], column] = row.values
    corrected = zip(
        stats.holm(p_M), stats.benjamini_hochberg(p_M), stats.step_down_max_t(diff_SM, seed=seed), strict=True
    )
    tests = (
        replace(row.tests, holm=float(holm), benjamini_hochberg=float(bh), max_t=float(max_t))
        for row, (holm, bh, max_t) in zip(rows, corrected, strict=True)
    )
    return {label: replace(row, tests=one) for (label, row), one in zip(differences.items(), tests, strict=True)}


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
            crossed=_same_examples(pairs),
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


def most_changed(pairs: Sequence[PairedSeed]) -> tuple[ExampleChange, ...]:
    """Return the examples whose loss changed most, improved before worsened."""
    if not pairs or not _same_examples(pairs):
        return ()
    mean_E = np.mean([pair.nll_E for pair in pairs], axis=0)
    order = np.argsort(mean_E, kind="stable")
    lowest = [index for index in order[:SHOWN_EXAMPLES] if mean_E[index] < 0]
    highest = [index for index in order[::-1][:SHOWN_EXAMPLES] if mean_E[index] > 0]
    return tuple(
        ExampleChange(example_id=str(pairs[0].ids_E[index]), difference=float(mean_E[index]))
        for index in (*lowest, *highest)
    )


def power_answers(difference: Difference, rule: Rule) -> tuple[PowerAnswer, ...]:
    """Return the seeds and examples that would show the observed difference, and one of the margin's size."""
    parts, sd = difference.components, difference.sd
    if parts is None or not sd:
        return ()
    answers = []
    for about, size in {"observed": abs(difference.mean), "margin": rule.margin.value}.items():
        if not size:
            continue
        needed, simulated = stats.checked_seeds(
            size, sd, comparisons=rule.comparisons, correction=rule.correction, alpha=rule.alpha, power=POWER
        )
        now, least = 0.0, None
        if parts.seeds >= rule.seeds_required:
            now = stats.paired_power(size, sd, parts.seeds, alpha=rule.alpha_each)
        if parts.example > 0:
            least = stats.examples_for_new_examples(size, parts, alpha=rule.alpha / max(1, rule.comparisons))
        answers.append(
            PowerAnswer(
                about=about,
                difference=size,
                seeds=parts.seeds,
                examples=parts.examples,
                power=now,
                seeds_needed=needed,
                simulated_power=simulated,
                examples_needed=stats.examples_for_power(size, parts, parts.seeds, alpha=rule.alpha_each),
                examples_at_least=least,
            )
        )
    return tuple(answers)
