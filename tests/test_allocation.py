"""Allocation: published counts, budgets, order, and errors. No torch needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product

import pytest
from allocation_cases import DIALOGPT_MEDIUM, NEEDED
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.allocation import METHODS, MethodSpec, ProfileSummary, RankPlan, allocate, uniform_cost
from adaptive_lora.allocation.budget import fit_to_budget
from adaptive_lora.allocation.site import Role
from adaptive_lora.errors import AllocationError, ConfigError, ModelError

PER_LAYER_RANK = 16 * 1024  # in + out of the four maps: (4 + 2 + 5 + 5) x 1024


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("uniform:rank=8", 8 * 24 * PER_LAYER_RANK),
        ("uniform:rank=16", 16 * 24 * PER_LAYER_RANK),
        ("linear_decay", sum(16 - (12 * i + 22) // 23 for i in range(24)) * PER_LAYER_RANK),
        ("attention_heavy", 24 * 1024 * (16 * 6 + 8 * 10)),
        ("three_band:rank=16", (7 * 9 + 10 * 19 + 7 * 16) * PER_LAYER_RANK),
        ("uniform:rank=16,placement=attention", 16 * 24 * 6 * 1024),
        ("uniform:rank=16,placement=feed_forward", 16 * 24 * 10 * 1024),
        ("uniform:rank=16,target_names=c_attn+c_proj", 16 * 24 * 11 * 1024),
        ("uniform:rank=16,target_names=c_fc", 16 * 24 * 5 * 1024),
    ],
)  # fmt: skip
def test_dialogpt_medium_parameters_are_derived(method: str, parameters: int) -> None:
    plan = allocate(MethodSpec.parse(method), DIALOGPT_MEDIUM)
    assert plan.trainable_parameters == parameters


def test_published_counts() -> None:
    counts = {
        method: allocate(MethodSpec.parse(method), DIALOGPT_MEDIUM).trainable_parameters
        for method in ("linear_decay", "attention_heavy", "three_band")
    }
    assert counts == {"linear_decay": 3_751_936, "attention_heavy": 4_325_376, "three_band": 5_980_160}


def test_linear_decay_up_mirrors_down() -> None:
    down, up = (allocate(MethodSpec.parse(f"linear_decay:direction={way}"), DIALOGPT_MEDIUM) for way in ("down", "up"))
    assert [e.rank for e in down.entries[::4]] == [e.rank for e in up.entries[::4]][::-1]


def test_one_alpha_for_all_ranks() -> None:
    plan = allocate(MethodSpec.parse("three_band"), DIALOGPT_MEDIUM)
    assert len({entry.rank for entry in plan.entries}) > 1
    assert {entry.alpha for entry in plan.entries} == {32.0}
    assert {plan.step_size_of(entry) for entry in plan.entries} == {32.0}


SCORES = {site.name: 1.0 + site.layer * 3 + site.in_features / 500 for site in DIALOGPT_MEDIUM}
SPECTRA = {name: tuple(score / i**2 for i in range(1, 33)) for name, score in SCORES.items()}
EVIDENCE = ProfileSummary(metric="test", scores=SCORES, spectra=SPECTRA)


@pytest.mark.parametrize("name", sorted(n for n, kind in METHODS.items() if kind.gives_ranks))
@pytest.mark.parametrize("budget", ["uniform-8", "1000000", "5432109"])
def test_every_method_fills_a_budget(name: str, budget: str) -> None:
    spec = MethodSpec.build(name, {"budget": budget, **NEEDED.get(name, {})})
    plan = allocate(spec, DIALOGPT_MEDIUM, profile=EVIDENCE)
    limit = uniform_cost(DIALOGPT_MEDIUM, 8) if budget == "uniform-8" else int(budget)
    slack = limit - plan.trainable_parameters
    if plan.trainable_parameters < limit and all(e.rank >= 64 for e in plan.entries):
        pytest.skip("every site is at the method's greatest rank")
    assert 0 <= slack < max(site.parameters_per_rank for site in DIALOGPT_MEDIUM)


def test_uniform_under_a_uniform_budget_is_uniform() -> None:
    plan = allocate(MethodSpec.parse("uniform:rank=3,budget=uniform-8"), DIALOGPT_MEDIUM)
    assert {entry.rank for entry in plan.entries} == {8}


def test_empirical_follows_scores_within_gora_limits() -> None:
    plan = allocate(MethodSpec.parse("empirical:rank=8"), DIALOGPT_MEDIUM, profile=EVIDENCE)
    assert all(4 <= entry.rank <= 32 for entry in plan.entries)
    queries = [entry.rank for entry in plan.entries if entry.site.role == Role.QKV]
    assert queries == sorted(queries)
    assert queries[0] < queries[-1]


@pytest.mark.parametrize("p", ["0.5", "1", "2", "4"])
def test_proportional_tempers_the_scores(p: str) -> None:
    """But for whole ranks, those of equal cost stand as their scores to the power 1/p."""
    decay = [i ** -float(p) for i in range(1, 60)]
    scores = {site.name: 16.0 if site.layer % 2 else 1.0 for site in DIALOGPT_MEDIUM}
    spectra = {name: tuple(score * value for value in decay) for name, score in scores.items()}
    known = ProfileSummary(metric="whitened_gradient", scores=scores, spectra=spectra)
    text = "proportional:rank=64,metric=whitened_gradient,target_names=c_attn,p="
    given, fitted = (allocate(MethodSpec.parse(text + value), DIALOGPT_MEDIUM, profile=known) for value in (p, "none"))
    low, high = (given.entries[index].rank for index in (0, 1))
    ratio = 16 ** (1 / float(p))
    assert abs(high - ratio * low) <= ratio + 1
    for own, other in zip(given.entries, fitted.entries, strict=True):
        assert abs(own.rank - other.rank) <= 1  # the fit is exact to rounding


def test_a_decay_that_cannot_be_fitted_is_an_error() -> None:
    spec, short = MethodSpec.parse("proportional:p=none"), dict.fromkeys(SCORES, (1.0, 0.5))
    for spectra, message in ((None, "needs a spectrum"), (short, "fewer than three")):
        known = ProfileSummary(metric="weight_gradient", scores=SCORES, spectra=spectra)
        with pytest.raises(AllocationError, match=message):
            allocate(spec, DIALOGPT_MEDIUM, profile=known)


def test_equal_scores_per_parameter_give_uniform() -> None:
    scores = {site.name: 0.3 * site.parameters_per_rank for site in DIALOGPT_MEDIUM}
    plan = allocate(
        MethodSpec.parse("empirical:rank=8"), DIALOGPT_MEDIUM, profile=ProfileSummary(metric="test", scores=scores)
    )
    assert {entry.rank for entry in plan.entries} == {8}


@pytest.mark.parametrize("bad", [0.0, float("nan"), -1.0])
def test_degenerate_profile_is_an_error(bad: float) -> None:
    scores = dict.fromkeys(SCORES, bad)
    with pytest.raises(AllocationError, match="degenerate"):
        allocate(MethodSpec.parse("empirical"), DIALOGPT_MEDIUM, profile=ProfileSummary(metric="test", scores=scores))


site_lists = st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=8)


@given(site_lists, st.floats(0, 1))
def test_budget_is_filled_in_order(sites: list[tuple[float, int, int]], share: float) -> None:
    weights, costs, upper = (list(column) for column in zip(*sites, strict=True))
    lower = [1] * len(sites)
    most = sum(c * u for c, u in zip(costs, upper, strict=True))
    budget = sum(costs) + int(share * (most - sum(costs)))
    ranks = fit_to_budget(weights, costs, lower, upper, budget)
    spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
    open_costs = [c for c, r, u in zip(costs, ranks, upper, strict=True) if r < u]
    assert spent <= budget
    assert all(low <= r <= high for low, r, high in zip(lower, ranks, upper, strict=True))
    assert not open_costs or budget - spent < min(open_costs)
    for i, j in product(range(len(sites)), repeat=2):
        if costs[i] == costs[j] and upper[i] == upper[j] and weights[i] > weights[j]:
            assert ranks[i] >= ranks[j]


@given(st.permutations(range(5)))
def test_budget_does_not_depend_on_the_order_of_sites(order: Sequence[int]) -> None:
    weights, costs, upper = [5.0, 3.0, 2.5, 1.2, 0.7], [4, 4, 6, 2, 4], [9, 9, 9, 9, 9]
    straight = fit_to_budget(weights, costs, [1] * 5, upper, 90)
    shuffled = fit_to_budget([weights[i] for i in order], [costs[i] for i in order], [1] * 5, upper, 90)
    assert shuffled == [straight[i] for i in order]


@pytest.mark.parametrize("budget", ["1", "99999999999"])
def test_impossible_budgets_are_errors(budget: str) -> None:
    with pytest.raises(AllocationError, match="budget of"):
        allocate(MethodSpec.build("uniform", {"budget": budget}), DIALOGPT_MEDIUM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom", "did you mean 'uniform'"),
        ("uniform:rank=0", "at least 1"),
        ("uniform:rank=two", "whole number"),
        ("uniform:rnk=4", "did you mean 'rank'"),
        ("uniform:rank", "option=value"),
        ("uniform:placement=everywhere", "must be one of all, attention, feed_forward"),
        ("uniform:budget=lots", "whole number of parameters"),
        ("linear_decay:direction=sideways", "must be one of down, up"),
        ("empirical:metric=vibes", "must be one of"),
    ],
)
def test_bad_methods_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSpec.parse(text)


def test_all_problems_of_a_method_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MethodSpec.parse("uniform:rank=0,placement=up,depth=3")
    assert all(word in str(caught.value) for word in ("rank", "placement", "depth"))


@pytest.mark.parametrize(
    ("text", "message"), [("uniform:rank=1025", "smaller side"), ("linear_decay:rank=2,low_rank=4", "low_rank <= rank")]
)
def test_ranks_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        allocate(MethodSpec.parse(text), DIALOGPT_MEDIUM)


def test_unknown_target_name() -> None:
    with pytest.raises(ModelError, match="c_atn"):
        allocate(MethodSpec.parse("uniform:target_names=c_atn"), DIALOGPT_MEDIUM)


def test_labels_tell_methods_apart() -> None:
    texts = [
        "uniform:rank=8", "uniform", "linear_decay", "linear_decay:direction=up", "three_band",
        "attention_heavy", "attention_heavy:feed_forward_rank=4", "empirical",
        "empirical:metric=gradient_norm", "uniform:placement=attention", "uniform:budget=uniform-8",
        "uniform:target_names=c_fc",
    ]  # fmt: skip
    assert len({MethodSpec.parse(text).label for text in texts}) == len(texts)


def test_plan_round_trip_and_damage() -> None:
    plan = allocate(MethodSpec.parse("three_band"), DIALOGPT_MEDIUM)
    values = json.loads(plan.to_json())
    assert RankPlan.from_dict(values) == plan
    values["sites"][0]["rank"] += 1
    with pytest.raises(AllocationError, match="contradicts"):
        RankPlan.from_dict(values)
    del values["sites"]
    with pytest.raises(AllocationError, match="not a rank plan"):
        RankPlan.from_dict(values)


def test_allocation_needs_no_torch() -> None:
    code = (
        "import sys, adaptive_lora.allocation, adaptive_lora.analysis.stats, adaptive_lora.config;"
        "assert not {'torch', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
