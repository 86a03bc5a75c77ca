"""Results beside the verdicts: audit, power, fronts, areas, early rate, agreement, budgets."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic_study import EFFECTS, FROZEN_LOSS, scores, study

from adaptive_lora.analysis import stats
from adaptive_lora.analysis.comparison import AgreementKind, AuditKind, Comparison, Cost, compare
from adaptive_lora.results import TrialRecord

BASE_SCORES = scores(FROZEN_LOSS, 0)


def change(records: list[TrialRecord], label: str, **fields: object) -> list[TrialRecord]:
    return [dataclasses.replace(r, **fields) if r.method == label else r for r in records]


def against_uniform(records: list[TrialRecord], **options: object) -> Comparison:
    return compare(records, baseline="uniform-r8", base_scores=BASE_SCORES, **options)


def entry(comparison: Comparison, topic: str) -> tuple[AuditKind, str]:
    found = [e for e in comparison.audit if e.topic == topic]
    assert found
    return found[0].kind, found[0].text


def test_a_fair_study_passes_every_check_and_says_what_was_checked() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": 0.0}, rates=(1e-4, 3e-4, 1e-3))
    comparison = against_uniform(records)
    assert comparison.fairness == ()
    assert {e.kind for e in comparison.audit} == {AuditKind.OK}
    assert {e.topic for e in comparison.audit} == {
        "parameters", "failures", "tuning", "skipped steps", "training cost", "scaling",
        "data order", "precision", "device", "data digest", "base hash", "code version",
        "token ids and loss masks",
        "package versions", "settings", "time and memory",
    }  # fmt: skip
    assert "uniform-r8 98,304" in entry(comparison, "parameters")[1]
    assert entry(comparison, "data digest")[1].endswith(": d1.")


def test_each_check_finds_its_fault_and_what_was_not_recorded_is_no_fault() -> None:
    fair = study({"uniform-r8": 0.0, "m-r8": 0.0}, rates=(1e-4, 3e-4, 1e-3))
    tags = fair[0].tags
    for name, topic in (("order_digest", "data order"), ("packages", "package versions")):
        other = change(fair, "m-r8", tags={**tags, name: "other"})
        kind, text = entry(against_uniform(other), topic)
        assert kind is AuditKind.BAD
        assert "m-r8" in text
        silent = change(fair, "m-r8", tags={k: v for k, v in tags.items() if k != name})
        assert entry(against_uniform(silent), topic)[0] is AuditKind.UNKNOWN
    longer = change(fair, "m-r8", settings={"cfg.epochs": "9.0", "cfg.study": "mine"})
    kind, text = entry(against_uniform(longer), "settings")
    assert kind is AuditKind.BAD
    assert "epochs: 3.0 (uniform-r8) against 9.0 (m-r8)" in text
    assert "mine" not in text


def test_times_of_trials_trained_together_do_not_compare_with_those_alone() -> None:
    fair = study({"uniform-r8": 0.0, "m-r8": 0.0})
    topic, metrics = "time and memory", dict(fair[0].metrics)
    joint = change(fair, "m-r8", metrics={**metrics, "trials_together": 8.0})
    kind, text = entry(against_uniform(joint), topic)
    assert kind is AuditKind.BAD
    assert "(alone: uniform-r8; among 8 trials at once: m-r8)" in text
    both = change(joint, "uniform-r8", metrics={**metrics, "trials_together": 8.0})
    assert entry(against_uniform(both), topic) == (
        AuditKind.OK, "Every trial was trained among 8 trials at once, so times and memory compare."
    )  # fmt: skip
    del metrics["trials_together"]
    silent = change(fair, "m-r8", metrics=metrics)
    assert entry(against_uniform(silent), topic)[0] is AuditKind.UNKNOWN


def test_early_stopping_is_no_other_data_order() -> None:
    fair = study({"uniform-r8": 0.0, "m-r8": 0.0})
    metrics = {**fair[0].metrics, "stopped_early": 1.0}
    stopped = change(fair, "m-r8", metrics=metrics, tags={**fair[0].tags, "order_digest": "short"})
    assert entry(against_uniform(stopped), "data order")[0] is AuditKind.UNKNOWN


def test_fronts_hold_the_methods_that_nothing_beats() -> None:
    comparison = against_uniform(study(EFFECTS, noise=0.001))
    assert {front.cost for front in comparison.fronts} == set(Cost)
    served = next(front for front in comparison.fronts if front.cost is Cost.SERVED)
    cost = {p.method: p.cost for p in served.points}
    assert cost["uniform-r16"] == 2 * cost["uniform-r8"]
    for point in served.points:
        beaten = any(
            (o.cost, o.loss) != (point.cost, point.loss) and o.cost <= point.cost and o.loss <= point.loss
            for o in served.points
        )
        assert point.on_front is not beaten
        assert point.front_share is not None
    by_method = {p.method: p for p in served.points}
    assert by_method["uniform-r16"].front_share == 1.0
    assert not by_method["three_band-r16"].on_front
    assert [p.cost for p in served.points] == sorted(p.cost for p in served.points)


def test_trained_parameters_are_those_that_a_recipe_recorded() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": 0.0})
    more = {**records[0].metrics, "training_parameters": 150_000.0}
    comparison = against_uniform(change(records, "m-r8", metrics=more))
    trained = next(front for front in comparison.fronts if front.cost is Cost.TRAINED)
    assert {p.method: p.cost for p in trained.points} == {"uniform-r8": 98_304, "m-r8": 150_000}
    assert comparison.method("m-r8").trained_parameters.mean == 150_000
    assert comparison.method("m-r8").parameters.mean == 98_304


def test_a_cost_that_was_not_recorded_is_named() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": 0.0})
    comparison = against_uniform(change(records, "m-r8", metrics={}))
    memory = next(front for front in comparison.fronts if front.cost is Cost.MEMORY)
    assert [p.method for p in memory.points] == ["uniform-r8"]
    assert "Not recorded: m-r8" in memory.note


def at_budgets(effects: dict[str, float]) -> list[TrialRecord]:
    """Return trials whose parameters are 1,000 per rank."""
    records = study(effects, range(6), noise=0.001)
    return [dataclasses.replace(r, trainable_parameters=1_000 * int(r.settings["method.rank"])) for r in records]


def test_area_under_the_front_by_hand() -> None:
    effects = {"uniform-r8": 0.0, "uniform-r4": 0.3, "uniform-r2": 0.5, "m-r8": -0.1, "m-r4": 0.1}
    comparison = against_uniform(at_budgets({**effects, "lonely-r4": 0.0}))
    areas = {area.family: area for area in comparison.areas}
    assert areas["uniform"].methods == ("uniform-r2", "uniform-r4", "uniform-r8")
    assert (areas["m"].low, areas["m"].high) == (4_000, 8_000)  # what both families cover
    # From 4,000 to just under 8,000 the front is that of rank 4.
    for family, label in (("uniform", "uniform-r4"), ("m", "m-r4")):
        expected = FROZEN_LOSS - comparison.method(label).loss.mean
        assert areas[family].gain == pytest.approx(expected)
        assert areas[family].interval.low <= expected <= areas[family].interval.high
    assert areas["m"].difference == pytest.approx(areas["m"].gain - areas["uniform"].gain)
    assert areas["m"].difference_interval.low > 0.15
    assert areas["uniform"].difference is None
    assert areas["lonely"].gain is None
    assert "one budget only" in areas["lonely"].note


def test_families_of_one_name_are_told_apart_by_their_options() -> None:
    records = at_budgets({"uniform-r8": 0.0, "uniform-r4": 0.2, "a-r8": 0.0, "b-r8": 0.1})
    placed = [
        dataclasses.replace(r, settings={**r.settings, "method.name": "x", "method.placement": r.method[0]})
        if r.method[0] in "ab"
        else r
        for r in records
    ]
    names = [area.family for area in against_uniform(placed).areas]
    assert names == ["uniform", "x (placement=a)", "x (placement=b)"]


def test_early_rate_is_where_the_curve_crosses_and_not_reached_is_no_number() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": 0.0, "late-r8": 0.0})
    straight = tuple((step, 3.0 - 0.02 * step) for step in range(0, 101, 20))
    records = change(records, "uniform-r8", validation_loss=1.5)
    records = change(records, "m-r8", validation_curve=straight)
    records = change(records, "late-r8", validation_curve=tuple((s, 2.0) for s, _ in straight))
    comparison = against_uniform(records)
    early = comparison.method("m-r8").early_rate
    assert early is not None
    assert (early.reached, early.seeds) == (6, 6)
    assert early.tokens == pytest.approx(75_000)  # 3 - 0.02 x 75 = 1.5, 1,000 tokens a step
    assert early.share == pytest.approx(0.75)
    late = comparison.method("late-r8").early_rate
    assert late is not None
    assert (late.reached, late.tokens, late.share) == (0, None, None)
    assert "not reached under seed 0" in late.note
    assert (
        compare([dataclasses.replace(r, validation_tokens=()) for r in records], baseline="uniform-r8")
        .method("m-r8")
        .early_rate
        is None
    )


def test_agreement_between_seeds_is_spearmans_and_uniform_has_no_order() -> None:
    comparison = against_uniform(study(EFFECTS))
    seeds = [a for a in comparison.agreements if a.kind is AgreementKind.SEEDS]
    assert [a.about for a in seeds] == ["empirical-r8-mean_abs_weight_gradient"]
    matrix, plans = seeds[0].matrix, {}
    for record in study(EFFECTS):
        if record.method == seeds[0].about:
            plans[record.seed] = [s["rank"] for s in record.plan["sites"]]
    expected = scipy_stats.spearmanr(plans[0], plans[3])[0]
    assert matrix[0][3] == matrix[3][0] == pytest.approx(expected)
    assert matrix[2][2] == 1.0
    off = [matrix[i][j] for i in range(6) for j in range(i)]
    assert seeds[0].mean == pytest.approx(np.mean(off))
    methods = next(a for a in comparison.agreements if a.kind is AgreementKind.METHODS)
    assert not any(label.startswith("uniform") for label in methods.labels)


def test_agreement_across_tasks_and_metrics() -> None:
    effects = {"uniform-r8": 0.0, "empirical-r8-a": 0.0, "empirical-r8-b": 0.0}
    records = [dataclasses.replace(r, tags={**r.tags, "data": f"task {r.seed % 2}"}) for r in study(effects)]
    found = {a.kind: a for a in against_uniform(records).agreements}
    assert found[AgreementKind.TASKS].labels == ("task 0", "task 1")
    assert found[AgreementKind.METRICS].labels == ("a", "b")
    assert found[AgreementKind.METRICS].about == "empirical"


def test_budget_maps_add_up() -> None:
    comparison = against_uniform(study(EFFECTS))
    assert [one.method for one in comparison.budgets] == list(EFFECTS)
    for one in comparison.budgets:
        assert sum(map(sum, one.shares)) == pytest.approx(1)
        assert sum(one.by_layer) == pytest.approx(1)
        assert sum(one.by_role) == pytest.approx(1)
        assert len(one.ranks) == len(one.layers) == 6
    uniform = comparison.budgets[0]
    assert uniform.by_layer == pytest.approx([1 / 6] * 6)
    # Of in + out: 512 + 256 + 640 + 640 = 2,048 at width 128.
    by_role = dict(zip(uniform.roles, uniform.by_role, strict=True))
    assert by_role == pytest.approx({"qkv": 512 / 2048, "output": 256 / 2048, "up": 640 / 2048, "down": 640 / 2048})
    falling = comparison.budgets[list(EFFECTS).index("linear_decay-r16-4")]
    assert falling.ranks[0][0] == 16
    assert falling.ranks[-1][0] == 4


def test_inconclusive_says_what_it_would_take_and_the_simulation_agrees() -> None:
    effects = {"uniform-r8": 0.0, "m-r8": 0.01, "n-r8": 0.008}
    comparison = against_uniform(study(effects, range(6), noise=0.02), margin=0.02)
    method = comparison.method("m-r8")
    assert method.difference is not None
    answers = {answer.about: answer for answer in method.difference.power}
    assert set(answers) == {"observed", "margin"}
    margin = answers["margin"]
    assert margin.difference == 0.02
    assert (margin.seeds, margin.examples) == (6, 40)
    expected = stats.seeds_for_power(0.02, method.difference.sd, alpha=0.05 / 2)
    assert margin.seeds_needed == expected
    assert margin.simulated_power == pytest.approx(0.8, abs=0.07)
    assert margin.power == 0.0  # 6 seeds and Holm for 2 methods cannot get below 0.0625
    assert f"about {expected} seeds for 80 % power" in method.verdict.text


def test_power_now_is_that_of_the_test_where_seeds_can_reach_the_level() -> None:
    effects = {"uniform-r8": 0.0, "m-r8": 0.005}
    comparison = against_uniform(study(effects, range(7), noise=0.03), margin=0.02)
    difference = comparison.method("m-r8").difference
    assert difference is not None
    answers = {answer.about: answer for answer in difference.power}
    assert answers["margin"].power == pytest.approx(stats.paired_power(0.02, difference.sd, 7))


def test_everything_is_json_and_says_the_same_again() -> None:
    first = against_uniform(study(EFFECTS), facts={"study id": "x"}).to_dict()
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first == against_uniform(study(EFFECTS), facts={"study id": "x"}).to_dict()
    assert first["facts"] == {"study id": "x"}
    assert all(math.isfinite(p["cost"]) for front in first["fronts"] for p in front["points"])


def test_benjamini_hochberg_decides_where_asked() -> None:
    records = study({"uniform-r8": 0.0, **{f"m-r{r}": -0.2 for r in range(1, 6)}})
    screened = against_uniform(records, correction="benjamini_hochberg")
    best = screened.method("m-r1")
    assert best.difference is not None
    assert screened.deciding_p(best.difference) == best.difference.tests.benjamini_hochberg
    assert best.verdict.kind == "better"  # six seeds, five methods: Holm cannot
    assert against_uniform(records).method("m-r1").verdict.kind != "better"
    assert any("share of false findings" in note for note in screened.notes)


def test_exact_match_has_its_own_intervals_and_correction() -> None:
    records = study({"uniform-r8": 0.0, "m-r8": -0.3, "n-r8": 0.0}, range(6), noise=0.05)
    comparison = against_uniform(records)
    shares = {(r.method, r.seed): r.test.exact_match for r in records}
    gaps = [shares["m-r8", s] - shares["uniform-r8", s] for s in range(6)]
    found = comparison.method("m-r8").exact_match_difference
    other = comparison.method("n-r8").exact_match_difference
    assert found is not None
    assert other is not None
    assert found.mean == pytest.approx(np.mean(gaps))
    assert found.sign_flip == pytest.approx(stats.sign_flip_test(gaps))
    assert found.holm == pytest.approx(stats.holm([found.sign_flip, other.sign_flip])[0])
    assert found.superiority == 1.0
    assert found.interval.low <= found.mean <= found.interval.high
    assert found.hierarchical.low <= found.mean <= found.hierarchical.high
    silent = [dataclasses.replace(r, test=dataclasses.replace(r.test, exact_match_E=None)) for r in records]
    assert against_uniform(silent).method("m-r8").exact_match_difference is None
