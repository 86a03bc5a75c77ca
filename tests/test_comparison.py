"""The comparison on made-up trials whose right answer is known."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from synthetic_study import BASE_LOSS, EFFECTS, FROZEN_LOSS, failed, plan_of, scores, study, trial

from adaptive_lora.analysis.comparison import VerdictKind, compare
from adaptive_lora.errors import DataError
from adaptive_lora.results import EvalResult, TrialRecord

BASE_SCORES = scores(FROZEN_LOSS, 0)


def two_methods(effect: float, seeds: int = 8, noise: float = 0.01) -> list[TrialRecord]:
    return study({"uniform-r8": 0.0, "linear_decay-r16-4": effect}, range(seeds), noise)


def kind_of(records: list[TrialRecord], **options: object) -> VerdictKind:
    comparison = compare(records, baseline="uniform-r8", **options)
    return comparison.methods[1].verdict.kind


def change(records: list[TrialRecord], label: str, **fields: object) -> list[TrialRecord]:
    return [dataclasses.replace(r, **fields) if r.method == label else r for r in records]


@pytest.mark.parametrize(
    ("effect", "expected"), [(-0.2, VerdictKind.BETTER), (0.2, VerdictKind.WORSE), (0.0, VerdictKind.EQUIVALENT)]
)
def test_known_effects_get_their_verdict(effect: float, expected: VerdictKind) -> None:
    assert kind_of(two_methods(effect), margin=0.05) is expected


def test_fewer_parameters_within_the_margin_are_non_inferior() -> None:
    records = change(two_methods(0.01), "linear_decay-r16-4", trainable_parameters=50_000)
    comparison = compare(records, baseline="uniform-r8", margin=0.05)
    assert comparison.methods[1].verdict.kind is VerdictKind.NON_INFERIOR
    assert comparison.winner == "linear_decay-r16-4"
    assert "fewer parameters" in comparison.headline
    assert "fewest parameters" in comparison.decision


def test_no_difference_is_said_as_clearly_and_keeps_the_baseline() -> None:
    comparison = compare(two_methods(0.0, noise=0.2), baseline="uniform-r8", margin=0.001)
    method = comparison.methods[1]
    assert method.verdict.kind is VerdictKind.INCONCLUSIVE
    assert comparison.headline.startswith("No difference shown in test loss between")
    assert comparison.winner == "uniform-r8"
    assert "80 % power" in method.verdict.text


def test_numbers_are_those_of_the_records() -> None:
    records = two_methods(-0.1)
    comparison = compare(records, baseline="uniform-r8", base_scores=BASE_SCORES)
    losses = {(r.method, r.seed): r.test.loss for r in records}
    expected = [losses["linear_decay-r16-4", s] - losses["uniform-r8", s] for s in range(8)]
    base, method = comparison.methods
    assert method.difference.values == pytest.approx(expected)
    assert method.difference.mean == pytest.approx(np.mean(expected))
    assert base.loss.mean == pytest.approx(np.mean([losses["uniform-r8", s] for s in range(8)]))
    assert base.loss.sd == pytest.approx(np.std([losses["uniform-r8", s] for s in range(8)], ddof=1))
    perplexities = [math.exp(losses["uniform-r8", s]) for s in range(8)]
    assert base.perplexity.mean == pytest.approx(np.mean(perplexities))
    assert comparison.frozen_loss == pytest.approx(FROZEN_LOSS)
    assert comparison.margin.value == pytest.approx(0.01 * (FROZEN_LOSS - base.loss.mean))
    assert method.parameters.difference == 118_784 - 98_304
    assert method.tokens_per_second.mean == pytest.approx(5200 + 40 * 3.5)


def test_test_loss_is_weighted_by_tokens() -> None:
    def lopsided(nll: tuple[float, float]) -> EvalResult:
        return EvalResult(
            example_ids=("a", "b"), nll_E=np.array(nll), tokens_E=np.array([1, 9]), correct_E=np.array([1, 3])
        )

    records = [trial("uniform-r8", s, 1.0, test=lopsided((5.0, 5.0))) for s in range(3)]
    records += [trial("m", s, 1.0, test=lopsided((5.0, 15.0))) for s in range(3)]
    base, method = compare(records, baseline="uniform-r8").methods
    assert base.loss.mean == pytest.approx(1.0)  # 10 nats over 10 tokens, not 3 per example
    assert method.difference.mean == pytest.approx(1.0)
    assert base.token_accuracy.mean == pytest.approx(0.4)
    assert base.exact_match.mean is None
    assert base.exact_match.note == "not scored"


def test_order_of_records_and_examples_changes_nothing() -> None:
    records = study(EFFECTS)
    expected = compare(records, baseline="uniform-r8", base_scores=BASE_SCORES)
    shuffled = []
    for record in random.Random(0).sample(records, len(records)):
        order = np.random.default_rng(record.seed).permutation(len(record.test.example_ids))
        test = EvalResult(
            example_ids=tuple(record.test.example_ids[i] for i in order),
            nll_E=record.test.nll_E[order],
            tokens_E=record.test.tokens_E[order],
            correct_E=record.test.correct_E[order],
            exact_match_E=record.test.exact_match_E[order],
        )
        shuffled.append(dataclasses.replace(record, test=test))
    again = compare(shuffled, baseline="uniform-r8", base_scores=BASE_SCORES)
    for method in expected.methods:
        other = again.method(method.label)
        assert other.verdict.kind is method.verdict.kind
        if method.difference is not None:
            assert other.difference.values == pytest.approx(method.difference.values)
            assert other.difference.hierarchical.low == pytest.approx(method.difference.hierarchical.low)


def test_same_seed_same_numbers_other_seed_other_intervals() -> None:
    records = study(EFFECTS)
    first = compare(records, baseline="uniform-r8").to_dict()
    assert first == compare(records, baseline="uniform-r8").to_dict()
    assert first != compare(records, baseline="uniform-r8", seed=1).to_dict()


def test_learning_rate_is_chosen_on_validation_not_on_test() -> None:
    records = []
    for seed in range(6):
        for label in ("uniform-r8", "m"):
            records.append(trial(label, seed, 2.0, lr=1e-3, validation_loss=1.0))
            records.append(trial(label, seed, 1.0, lr=1e-4, validation_loss=1.5))
    comparison = compare(records, baseline="uniform-r8")
    assert [m.lr for m in comparison.methods] == [1e-3, 1e-3]
    assert comparison.methods[0].loss.mean == pytest.approx(2.0)
    chosen = [rate.lr for rate in comparison.methods[0].rates if rate.chosen]
    assert chosen == [1e-3]


def test_a_rate_cannot_win_by_failing_where_it_is_bad() -> None:
    records = two_methods(0.0, seeds=4)
    records += [trial("linear_decay-r16-4", 0, 0.5, lr=1e-2)]
    records += [failed("linear_decay-r16-4", s, "loss not finite", lr=1e-2, run_id=f"f{s}") for s in (1, 2, 3)]
    method = compare(records, baseline="uniform-r8").methods[1]
    assert method.lr == 3e-4
    assert len(method.failures) == 3


def test_best_against_best_and_shared_rate_are_both_given() -> None:
    records = []
    for seed in range(6):
        own = 0.001 * seed
        records += [trial("uniform-r8", seed, 1.0, lr=1e-4), trial("uniform-r8", seed, 1.2, lr=1e-3)]
        records += [trial("m", seed, 1.5 + own, lr=1e-4), trial("m", seed, 0.9 + own, lr=1e-3)]
    method = compare(records, baseline="uniform-r8").methods[1]
    assert (method.difference.lr, method.difference.baseline_lr) == (1e-3, 1e-4)
    assert method.difference.mean == pytest.approx(-0.1 + 0.0025)
    assert (method.shared_rate.lr, method.shared_rate.baseline_lr) == (1e-4, 1e-4)
    assert method.shared_rate.mean == pytest.approx(0.5 + 0.0025)


def test_folds_are_averaged_within_a_seed_and_do_not_count_as_seeds() -> None:
    records = []
    for seed in range(3):
        for fold, gap in ((0, -0.1), (1, -0.3)):
            records.append(trial("uniform-r8", seed, BASE_LOSS, fold=fold))
            records.append(trial("m", seed, BASE_LOSS + gap + 0.01 * seed, fold=fold))
    records = [r for r in records if (r.method, r.seed, r.fold) != ("m", 2, 1)]
    frozen = {fold: scores(FROZEN_LOSS, 0, fold=fold) for fold in (0, 1)}
    comparison = compare(records, baseline="uniform-r8", base_scores=frozen)
    method = comparison.methods[1]
    assert method.difference.seeds == (0, 1)  # seed 2 lacks a fold
    assert method.missing_seeds == (2,)
    assert method.difference.values == pytest.approx((-0.2, -0.19))
    assert comparison.frozen_loss == pytest.approx(FROZEN_LOSS)
    assert method.difference.hierarchical.low is not None


def test_below_six_seeds_it_says_that_no_p_can_be_reached() -> None:
    comparison = compare(two_methods(-0.3, seeds=5), baseline="uniform-r8")
    method = comparison.methods[1]
    assert method.difference.tests.sign_flip == method.difference.tests.attainable == 0.0625
    assert method.difference.interval.high < 0
    assert method.verdict.kind is VerdictKind.INCONCLUSIVE
    assert any("no p-value under 0.05 can be reached" in note for note in comparison.notes)
    assert comparison.winner == "uniform-r8"
    assert kind_of(two_methods(-0.3, seeds=6)) is VerdictKind.BETTER


def test_holm_needs_more_seeds_with_more_methods_and_says_so() -> None:
    six = compare(study(EFFECTS), baseline="uniform-r8")
    best = six.method("uniform-r16")
    assert best.difference.tests.holm == pytest.approx(5 / 32)
    assert best.verdict.kind is VerdictKind.INCONCLUSIVE
    assert any("least corrected p is 0.156" in note for note in six.notes)
    eight = compare(study(EFFECTS, range(8)), baseline="uniform-r8")
    assert eight.method("uniform-r16").verdict.kind is VerdictKind.BETTER
    max_t = compare(study(EFFECTS), baseline="uniform-r8", correction="max_t")
    assert max_t.method("uniform-r16").verdict.kind is VerdictKind.BETTER


def test_one_seed_gives_no_interval_and_no_deviation() -> None:
    comparison = compare(two_methods(-0.3, seeds=1), baseline="uniform-r8", base_scores=BASE_SCORES)
    method = comparison.methods[1]
    assert method.loss.sd is None
    assert method.difference.interval.low is None
    assert "one seed" in method.difference.interval.note
    assert method.difference.effect.d_z is None


def test_more_parameters_are_no_evidence_about_the_allocation() -> None:
    records = two_methods(-0.2)
    comparison = compare(records, baseline="uniform-r8")
    assert "more parameters, so this is no evidence about the allocation" in comparison.headline
    same = change(records, "linear_decay-r16-4", trainable_parameters=98_304)
    fair = compare(same, baseline="uniform-r8")
    assert "at equal parameters" in fair.headline
    assert not any("Unequal" in finding for finding in fair.fairness)
    rest = change(records, "linear_decay-r16-4", trainable_parameters=98_304 + 42)  # what whole sizes leave over
    assert "at equal parameters (42 more)." in compare(rest, baseline="uniform-r8").headline


def test_failed_trials_appear_with_their_reason_and_pairs_use_the_rest() -> None:
    records = [r for r in two_methods(-0.2) if (r.method, r.seed) != ("linear_decay-r16-4", 3)]
    records.append(failed("linear_decay-r16-4", 3, "loss not finite at step 12"))
    records.append(failed("broken", 0, "out of memory"))
    comparison = compare(records, baseline="uniform-r8")
    method, broken = comparison.method("linear_decay-r16-4"), comparison.method("broken")
    assert [(f.seed, f.reason) for f in method.failures] == [(3, "loss not finite at step 12")]
    assert 3 not in method.difference.seeds
    assert len(method.difference.seeds) == 7
    assert broken.verdict.kind is VerdictKind.NOT_COMPARED
    assert broken.loss.mean is None
    assert broken.loss.note == "no seed finished"
    assert comparison.failed_trials == 2
    text = " ".join(comparison.fairness)
    assert "loss not finite at step 12" in text
    assert "out of memory" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_finished_trial_without_a_finite_loss_counts_as_failed(value: float) -> None:
    records = two_methods(-0.2)
    last = records[-1]
    test = dataclasses.replace(last.test, nll_E=np.full_like(last.test.nll_E, value))
    records[-1] = dataclasses.replace(last, test=test)
    comparison = compare(records, baseline="uniform-r8")
    assert comparison.methods[1].failures[0].reason == "test loss is not finite"
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_a_failure_that_was_run_again_with_success_does_not_count() -> None:
    records = [failed("uniform-r8", 0, "interrupted"), *two_methods(-0.2)]
    assert compare(records, baseline="uniform-r8").failed_trials == 0


def test_different_examples_are_refused_by_name() -> None:
    records = two_methods(-0.2)
    last = records[-1]
    ids = ("stranger", *last.test.example_ids[1:])
    records[-1] = dataclasses.replace(last, test=dataclasses.replace(last.test, example_ids=ids))
    with pytest.raises(DataError, match="example-0-000") as caught:
        compare(records, baseline="uniform-r8")
    assert "stranger" in str(caught.value)
    assert "seed 7" in str(caught.value)


def test_different_tokens_of_one_example_are_refused() -> None:
    records = two_methods(-0.2)
    last = records[-1]
    tokens = last.test.tokens_E.copy()
    tokens[4] += 1
    records[-1] = dataclasses.replace(last, test=dataclasses.replace(last.test, tokens_E=tokens))
    with pytest.raises(DataError, match="example-0-004"):
        compare(records, baseline="uniform-r8")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "got none"),
        (two_methods(0.0, 2), "did you mean 'uniform-r8'"),
        ([failed("uniform-r80", 0, "out of memory")], "out of memory"),
        ([trial("uniform-r80", 0, 1.0), trial("uniform-r80", 0, 1.0, run_id="again")], "two finished runs"),
    ],
)
def test_what_cannot_be_compared_is_an_error(records: list[TrialRecord], message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(records, baseline="uniform-r80")


def test_frozen_scores_of_other_examples_and_a_margin_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="frozen base"):
        compare(two_methods(0.0), baseline="uniform-r8", base_scores=scores(3.0, 0, examples=10))
    with pytest.raises(DataError, match="margin"):
        compare(two_methods(0.0), baseline="uniform-r8", margin=0.0)


def test_without_a_margin_equivalence_is_not_claimed() -> None:
    comparison = compare(two_methods(0.0), baseline="uniform-r8")
    assert comparison.margin.value is None
    assert comparison.methods[1].verdict.kind is VerdictKind.INCONCLUSIVE
    assert any("equivalence is not tested" in note for note in comparison.notes)


def test_fairness_names_grid_edges_grids_skips_scales_and_precision() -> None:
    records = study({"uniform-r8": 0.0, "m": 0.0}, range(6), rates=(1e-4, 3e-4, 1e-3))
    records = [r for r in records if (r.method, r.lr) != ("m", 1e-3)]
    plan = plan_of("uniform-r8")
    for site in plan["sites"]:
        site["step_size"] = 2.0 * site["rank"]
    plan["scaling"] = "constant"
    records = change(records, "m", plan=plan, metrics={"skipped_steps": 1.0})
    records = [dataclasses.replace(r, tags={**r.tags, "precision": "bf16"}) if r.method == "m" else r for r in records]
    text = "\n".join(compare(records, baseline="uniform-r8").fairness)
    assert "m: its best learning rate 0.0003 is the highest of the grid" in text
    assert "different learning rates to choose from" in text
    assert "m: 6 training steps skipped" in text
    assert "Factor x rank is not the same everywhere under scaling standard (factor" in text
    assert "uniform-r8: 32; m: 16" in text
    assert "Trials differ in precision" in text
    clean = compare(study({"uniform-r8": 0.0, "m": 0.0}, rates=(1e-4, 3e-4, 1e-3)), baseline="m")
    assert clean.fairness == ()


def test_what_differs_between_seeds_alone_is_no_unfairness() -> None:
    records = study({"uniform-r8": 0.0, "m": 0.0}, range(6), rates=(1e-4, 3e-4, 1e-3))
    pooled = [dataclasses.replace(r, tags={**r.tags, "data_digest": f"d{r.seed % 2}"}) for r in records]
    comparison = compare(pooled, baseline="m")
    assert comparison.fairness == ()
    assert any(
        "Under each seed all trials have the same data digest, of 2: d0 and d1" in e.text for e in comparison.audit
    )
    apart = [dataclasses.replace(r, tags={**r.tags, "data_digest": f"d{r.seed % 2}{r.method}"}) for r in records]
    assert "Trials differ in data digest" in "".join(compare(apart, baseline="m").fairness)


def test_fairness_of_methods_without_ranks() -> None:
    """Dropout acts before A, and factor x rank is said of LoRA's ranks alone."""
    records = change(study({"uniform-r8": 0.0, "peft-HIRA": 0.0}, range(6)), "peft-HIRA", plan={"family": "peft"})
    without = compare(records, baseline="uniform-r8").fairness
    records = [dataclasses.replace(r, settings={**r.settings, "cfg.dropout": "0.1"}) for r in records]
    (found,) = set(compare(records, baseline="uniform-r8").fairness) - set(without)
    assert found == "Dropout of 0.1 acts before LoRA's A alone: peft-HIRA trained without it."
    comparison = compare([dataclasses.replace(r, plan={"family": "peft"}) for r in records], baseline="uniform-r8")
    assert "Scaling: no method has LoRA's ranks." in [entry.text for entry in comparison.audit]


def test_winner_is_the_best_of_the_better_ones() -> None:
    effects = {"uniform-r8": 0.0, "a": -0.1, "b": -0.2, "c": 0.1}
    comparison = compare(study(effects, range(8)), baseline="uniform-r8")
    assert comparison.winner == "b"
    assert comparison.headline.startswith("b is better than uniform-r8")
    assert "Better too: a." in comparison.headline
    assert "Worse: c." in comparison.headline
    assert "lowest mean test loss" in comparison.decision


def test_json_has_no_nan_and_every_gap_has_a_note() -> None:
    records = change(two_methods(800.0, seeds=3), "uniform-r8", metrics={})
    records.append(failed("broken", 0, "out of memory"))
    values = compare(records, baseline="uniform-r8").to_dict()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values

    def gaps(value: object) -> list[dict[str, object]]:
        if isinstance(value, dict):
            here = [value] if "note" in value and None in value.values() else []
            return here + [gap for item in value.values() for gap in gaps(item)]
        return [gap for item in value for gap in gaps(item)] if isinstance(value, list) else []

    assert gaps(values)
    assert all(gap["note"] for gap in gaps(values))
    too_large = values["methods"][1]["perplexity"]
    assert (too_large["mean"], too_large["note"]) == (None, "too large for a number")


def test_most_changed_examples_are_those_that_changed() -> None:
    records = two_methods(0.0, noise=0.0)
    moved = []
    for record in records:
        if record.method == "linear_decay-r16-4":
            nll = record.test.nll_E.copy()
            nll[7] -= 5
            nll[9] += 4
            test = dataclasses.replace(record.test, nll_E=nll)
            record = dataclasses.replace(record, test=test)
        moved.append(record)
    changes = compare(moved, baseline="uniform-r8").methods[1].most_changed
    assert changes[0].example_id == "example-0-007"
    assert changes[0].difference == pytest.approx(-5)
    by_id = {change.example_id: change.difference for change in changes}
    assert by_id["example-0-009"] == pytest.approx(4)


def test_the_headline_names_equivalent_methods_beside_open_and_worse_ones() -> None:
    records = study({"uniform-r8": 0.0, "same": 0.0, "bad": 0.5}, range(8), noise=0.001)
    records += [r for r in study({"open": 0.0}, range(8), noise=0.3) if r.method == "open"]
    comparison = compare(records, baseline="uniform-r8", margin=0.02)
    kinds = {m.label: m.verdict.kind for m in comparison.methods[1:]}
    assert kinds == {"same": VerdictKind.EQUIVALENT, "bad": VerdictKind.WORSE, "open": VerdictKind.INCONCLUSIVE}
    assert "No difference shown in test loss between open and uniform-r8" in comparison.headline
    assert "Equivalent: same. Worse: bad." in comparison.headline
