"""From pairs to numbers: the difference of a method to the baseline with all its tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison.pairing import PairedSeed
from adaptive_lora.analysis.comparison.types import Difference, ExampleChange, MarginTests, ScoreDifference, Tests
from adaptive_lora.results import FloatArray

SHOWN_EXAMPLES = 3
"""Most changed examples kept per direction."""


def one_sided(confidence: float) -> float:
    """Return the confidence of the interval whose ends are one-sided tests at 1 - confidence."""
    return round(2 * confidence - 1, 12)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all differences of one comparison share."""

    confidence: float
    margin: float | None
    alpha_each: float
    """Level divided by the number of comparisons: what the first step of Holm asks for."""
    seed: int


def measure(pairs: Sequence[PairedSeed], lr: float, baseline_lr: float, settings: Settings) -> Difference:
    """Return the difference over at least one paired seed; corrected p-values come later."""
    diff_S = np.array([pair.loss for pair in pairs])
    mean = float(diff_S.mean())
    sd = float(diff_S.std(ddof=1)) if diff_S.size > 1 else None

    rows = ([pair.nll_E * pair.fold_scale_E for pair in pairs], [pair.tokens_E * pair.fold_scale_E for pair in pairs])
    crossed = _same_examples(pairs)

    def seeds_for(difference: float | None) -> int | None:
        if difference is None or not sd:
            return None
        return stats.seeds_for_power(difference, sd, alpha=settings.alpha_each)

    return Difference(
        lr=lr,
        baseline_lr=baseline_lr,
        seeds=tuple(pair.seed for pair in pairs),
        values=tuple(float(value) for value in diff_S),
        mean=mean,
        sd=sd,
        interval=stats.mean_interval(diff_S, confidence=settings.confidence, seed=settings.seed),
        hierarchical=stats.two_way_interval(*rows, crossed=crossed, confidence=settings.confidence, seed=settings.seed),
        effect=stats.paired_effect(diff_S, confidence=settings.confidence),
        tests=_tests(diff_S, settings.seed),
        margin_tests=_margin_tests(diff_S, settings),
        seeds_for_difference=seeds_for(mean),
        seeds_for_margin=seeds_for(settings.margin),
        components=stats.variance_components(*rows, crossed=crossed),
    )


def _tests(diff_S: FloatArray, seed: int) -> Tests:
    """Return the tests of one difference, not yet corrected for several methods."""
    p = stats.sign_flip_test(diff_S, seed=seed)
    return Tests(
        sign_flip=p,
        attainable=stats.attainable_p(diff_S.size),
        holm=p,
        benjamini_hochberg=p,
        max_t=p,
        wilcoxon=stats.wilcoxon(diff_S),
        paired_t=stats.paired_t(diff_S),
        normality=stats.normality(diff_S),
        symmetry=stats.symmetry(diff_S),
    )


def _margin_tests(diff_S: FloatArray, settings: Settings) -> MarginTests | None:
    margin = settings.margin
    if margin is None:
        return None
    return MarginTests(
        interval=stats.mean_interval(diff_S, confidence=one_sided(settings.confidence), seed=settings.seed),
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
    p_M = np.array([row.tests.sign_flip for row in rows])
    holm_M, bh_M = stats.holm(p_M), stats.benjamini_hochberg(p_M)
    seeds = sorted({one for row in rows for one in row.seeds})
    diff_SM = np.zeros((len(seeds), len(rows)))
    for column, row in enumerate(rows):
        diff_SM[[seeds.index(one) for one in row.seeds], column] = row.values
    max_t_M = stats.step_down_max_t(diff_SM, seed=seed)
    return {
        label: dataclasses.replace(
            row,
            tests=dataclasses.replace(
                row.tests, holm=float(holm_M[index]), benjamini_hochberg=float(bh_M[index]), max_t=float(max_t_M[index])
            ),
        )
        for index, (label, row) in enumerate(differences.items())
    }


def exact_match_difference(pairs: Sequence[PairedSeed], settings: Settings) -> ScoreDifference | None:
    """Return the difference in exact match, or None where a pair has no such score."""
    known = [pair.exact_match for pair in pairs if pair.exact_match is not None]
    if not known or len(known) < len(pairs):
        return None
    match_SE = [pair.match_E for pair in pairs if pair.match_E is not None]
    p = stats.sign_flip_test(known, seed=settings.seed)
    return ScoreDifference(
        mean=float(np.mean(known)),
        interval=stats.mean_interval(known, confidence=settings.confidence, seed=settings.seed),
        hierarchical=stats.two_way_interval(
            match_SE,
            [np.ones_like(match_E) for match_E in match_SE],
            crossed=_same_examples(pairs),
            confidence=settings.confidence,
            seed=settings.seed,
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
    return {
        label: dataclasses.replace(row, holm=float(p)) for (label, row), p in zip(known.items(), holm_M, strict=True)
    }


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
