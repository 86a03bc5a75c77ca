"""Comparisons of other numbers than a test loss: scores of which more is better, and one run per method."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats as distributions
from synthetic_study import EFFECTS, study

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import Comparison, VerdictKind, compare
from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.results import EvalResult, TrialRecord

ACCURACY = Outcome(name="accuracy", unit="", higher_is_better=True)


def scored(method: str, seed: int, score_E: np.ndarray, parameters: int | None = None) -> TrialRecord:
    test = EvalResult(
        example_ids=tuple(f"q{number}" for number in range(score_E.size)),
        nll_E=score_E.astype(float),
        tokens_E=np.ones(score_E.size, dtype=np.int64),
        correct_E=None,
        unit="",
    )
    return TrialRecord(
        run_id=f"{method} {seed}", method=method, seed=seed, fold=0, lr=None, status="FINISHED",
        trainable_parameters=parameters, test=test,
    )  # fmt: skip


def right_answers(effect: float, examples: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of 0 and 1 of a baseline right in 60 %, and of a method that is right on others too."""
    rng = np.random.default_rng(seed)
    base_E = (rng.random(examples) < 0.6).astype(float)
    method_E = base_E.copy()
    for right, share in ((1.0, 0.1 + max(0.0, -effect)), (0.0, 0.1 + max(0.0, effect))):
        method_E[rng.permutation(np.flatnonzero(base_E == right))[: round(share * examples)]] = 1 - right
    return base_E, method_E


def one_run(effect: float = 0.0, **options: object) -> Comparison:
    base_E, method_E = right_answers(effect)
    records = [scored("uniform", 0, base_E), scored("waterfill", 0, method_E)]
    return compare(records, baseline="uniform", outcome=ACCURACY, over="example", **options)


def test_a_score_of_which_more_is_better_mirrors_its_loss() -> None:
    """Negated losses give the same verdicts and p-values, and negated differences and intervals."""
    records = study(EFFECTS, range(7), rates=(1e-4, 3e-4))
    turned = [
        dataclasses.replace(
            r,
            validation_loss=-r.validation_loss,
            validation_curve=(),
            validation_tokens=(),
            test=dataclasses.replace(r.test, nll_E=-r.test.nll_E, unit=""),
        )
        for r in records
    ]
    loss = compare(records, baseline="uniform-r8", margin=0.02)
    score = compare(turned, baseline="uniform-r8", margin=0.02, outcome=ACCURACY)
    assert score.winner == loss.winner != "uniform-r8"
    for mine, theirs in zip(score.methods, loss.methods, strict=True):
        assert (mine.label, mine.lr, mine.verdict.kind) == (theirs.label, theirs.lr, theirs.verdict.kind)
        if theirs.difference is None:
            continue
        assert mine.difference.mean == pytest.approx(-theirs.difference.mean)
        assert mine.difference.tests.max_t == theirs.difference.tests.max_t
        assert mine.difference.effect.superiority == theirs.difference.effect.superiority
        assert mine.difference.margin_tests.noninferior == theirs.difference.margin_tests.noninferior
        assert [c.example_id for c in mine.most_changed] == [c.example_id for c in theirs.most_changed]
    for mine, theirs in zip(score.fronts, loss.fronts, strict=True):
        on_front = ({point.method for point in front.points if point.on_front} for front in (mine, theirs))
        assert len({frozenset(methods) for methods in on_front}) == 1


def test_words_are_those_of_the_score() -> None:
    comparison = one_run(0.1, margin=0.02)
    texts = [comparison.headline, *comparison.notes, comparison.decision, *(m.verdict.text for m in comparison.methods)]
    assert not [text for text in texts if "loss" in text or "nats" in text]
    assert "waterfill is better than uniform: accuracy +0.1000" in comparison.answer
    assert "600 examples" in comparison.answer
    assert comparison.decision.startswith("highest mean accuracy of the methods")


def test_one_run_per_method_is_tested_over_examples_and_says_so() -> None:
    comparison = one_run(0.1)
    method = comparison.methods[1]
    base_E, method_E = right_answers(0.1)
    gained, lost = int((method_E > base_E).sum()), int((method_E < base_E).sum())
    exact = distributions.binomtest(gained, gained + lost).pvalue  # McNemar's exact test
    assert method.difference.tests.sign_flip == pytest.approx(exact)
    assert method.difference.tests.paired_t == pytest.approx(distributions.ttest_rel(method_E, base_E).pvalue)
    assert method.difference.tests.wilcoxon == pytest.approx(distributions.wilcoxon(method_E - base_E).pvalue)
    assert method.difference.mean == pytest.approx(method_E.mean() - base_E.mean())
    assert (method.difference.replicates, method.difference.seeds) == (600, (0,))
    t = distributions.ttest_rel(method_E, base_E).confidence_interval(0.95)
    assert method.difference.interval.low == pytest.approx(t.low, abs=0.003)
    assert method.difference.interval.high == pytest.approx(t.high, abs=0.003)
    assert method.loss_interval.low < method.loss.mean < method.loss_interval.high
    assert any("nothing about other seeds" in note for note in comparison.notes)
    assert "standard deviation" not in " ".join(comparison.notes)


@pytest.mark.parametrize(
    ("effect", "margin", "kind"),
    [
        (0.1, 0.02, VerdictKind.BETTER),
        (-0.1, 0.02, VerdictKind.WORSE),
        (0.0, 0.1, VerdictKind.EQUIVALENT),
        (0.0, 0.01, VerdictKind.INCONCLUSIVE),
    ],
)
def test_known_effects_of_one_run_get_their_verdict(effect: float, margin: float, kind: VerdictKind) -> None:
    method = one_run(effect, margin=margin).methods[1]
    assert method.verdict.kind is kind
    if kind is VerdictKind.INCONCLUSIVE:
        needed = method.difference.power[-1].examples_needed
        assert needed > 600
        assert f"{needed:,} test examples instead of 600 for 80 % power" in method.verdict.text


def test_parameters_that_are_not_known_are_neither_zero_nor_equal() -> None:
    comparison = one_run()
    parameters = [entry for entry in comparison.audit if entry.topic == "parameters"]
    assert [str(entry.kind) for entry in parameters] == ["unknown"]
    assert "not given for uniform and waterfill" in parameters[0].text
    assert comparison.methods[0].parameters.mean is None
    assert not [text for text in (comparison.headline, comparison.methods[1].verdict.text) if "parameters" in text]
    topics = {entry.topic for entry in comparison.audit if str(entry.kind) == "ok"}
    assert topics == {"failures"}  # nothing else was recorded, so nothing else is called fair


def test_parameters_that_are_known_decide_as_in_a_study() -> None:
    base_E, method_E = right_answers(0.0)
    records = [scored("large", 0, base_E, 2_000_000), scored("small", 0, method_E, 500_000)]
    comparison = compare(records, baseline="large", margin=0.1, outcome=ACCURACY, over="example")
    assert comparison.methods[1].verdict.kind is VerdictKind.NON_INFERIOR
    assert comparison.winner == "small"
    assert "holds its accuracy within 0.1000" in comparison.answer


def test_many_values_are_flipped_as_few_are() -> None:
    """Above 256 values flips are drawn in parts; the p agrees with flips drawn at once."""
    rng = np.random.default_rng(1)
    for diff_S in (rng.normal(0.05, 1, 1_000), np.round(rng.normal(0.05, 1, 1_000), 1)):
        signs_BS = rng.integers(0, 2, (20_000, 1_000)) * 2 - 1
        for alternative, extreme in (
            ("two-sided", np.abs(signs_BS @ diff_S) >= abs(diff_S.sum()) - 1e-9),
            ("less", signs_BS @ diff_S <= diff_S.sum() + 1e-9),
        ):
            p = stats.sign_flip_test(diff_S, alternative=alternative)
            assert p == pytest.approx(extreme.mean(), abs=0.015)
    two = np.stack([rng.normal(0.1, 1, 600), rng.normal(0, 1, 600)], axis=1)
    p_M = stats.step_down_max_t(two)
    single_M = [stats.sign_flip_test(column) for column in two.T]
    assert single_M[0] <= p_M[0] + 0.01 <= 2 * single_M[0] + 0.03
    assert p_M[1] == pytest.approx(max(p_M[0], single_M[1]), abs=0.02)
    assert stats.sign_flip_test(np.zeros(500)) == 1.0
    assert stats.attainable_p(5_000) == 0.0
