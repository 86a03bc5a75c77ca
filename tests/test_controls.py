"""Control arms: the ranks of another method without its knowledge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from allocation_cases import DIALOGPT_MEDIUM, evidence

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.allocation.site import ATTENTION_ROLES
from adaptive_lora.errors import ConfigError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.runner.trial_log import trial_metrics

KNOWN = evidence(DIALOGPT_MEDIUM)
WRAPPED = ("empirical:rank=8", "waterfill:rank=8", "linear_decay", "proportional:p=1,max_rank=40")


def plan_of(text: str, seed: int = 0) -> RankPlan:
    """Allocate on DialoGPT-medium."""
    return allocate(MethodSpec.parse(text), DIALOGPT_MEDIUM, profile=KNOWN, seed=seed)


def of(control: str, wrapped: str) -> str:
    """Return the control arm of a method."""
    name, _, rest = wrapped.partition(":")
    return f"{control}:of={name}" + (f",{rest}" if rest else "")


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_random_permutes_within_equal_costs(wrapped: str) -> None:
    plain, drawn, other = (plan_of(wrapped), plan_of(of("random", wrapped)), plan_of(of("random", wrapped), seed=1))
    assert drawn.trainable_parameters == plain.trainable_parameters
    assert plain.rank_pattern() != drawn.rank_pattern() != other.rank_pattern()
    assert drawn == plan_of(of("random", wrapped))

    def by_cost(plan: RankPlan) -> Counter[tuple[int, int]]:
        return Counter((entry.site.parameters_per_rank, entry.rank) for entry in plan.entries)

    assert by_cost(drawn) == by_cost(plain) == by_cost(other)


def test_a_draw_depends_on_seed_and_site_alone() -> None:
    """Two methods that give one order of ranks are permuted alike; fewer sites shift nothing."""
    whole = plan_of("random:of=linear_decay").rank_pattern()
    flatter = plan_of("random:of=linear_decay,low_rank=6").rank_pattern()
    for one, other in product(whole, repeat=2):
        if whole[one] > whole[other] and one.split(".")[3:] == other.split(".")[3:]:
            assert flatter[one] >= flatter[other]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_inverse_reverses_the_order_at_the_same_budget(wrapped: str) -> None:
    plain, inverse = plan_of(wrapped), plan_of(of("inverse", wrapped))
    budget = plain.budget or plain.trainable_parameters
    assert 0 <= budget - inverse.trainable_parameters < 5 * 1024
    for one, other in product(plain.entries, repeat=2):
        if one.site.parameters_per_rank == other.site.parameters_per_rank and one.rank > other.rank:
            ranks = inverse.rank_pattern()
            assert ranks[one.site.name] <= ranks[other.site.name]


def test_inverse_also_reverses_families() -> None:
    heavy = plan_of("attention_heavy:rank=16,feed_forward_rank=4")
    light = plan_of("inverse:of=attention_heavy,rank=16,feed_forward_rank=4")
    for entry, mirrored in zip(heavy.entries, light.entries, strict=True):
        if entry.site.role in ATTENTION_ROLES:
            assert mirrored.rank < entry.rank
        else:
            assert mirrored.rank > entry.rank


@pytest.mark.parametrize(
    ("options", "attention", "others"),
    [
        # 24 layers of 6 and 10 times 1,024 parameters per rank: 6a + 10b = 16 x 8 has the pairs
        # (18, 2), (13, 5), (8, 8), (3, 11), and with a little left over (16, 3), (14, 4), (11, 6)
        ("ratio=3", {13}, {5}),
        ("ratio=3.5", {14, 15}, {4}),
        ("ratio=1", {8}, {8}),
        ("ratio=0.25", {3}, {11}),
        ("ratio=0.25,multiple=2", {4, 6}, {10, 12}),
        ("ratio=3,attention_cap=10", {10}, {6, 7}),
        ("ratio=3,placement=attention", {21, 22}, set()),
    ],
)
def test_family_uniform_has_two_levels(options: str, attention: set[int], others: set[int]) -> None:
    plan = plan_of(f"family_uniform:rank=8,budget=uniform-8,{options}")
    found = {True: set[int](), False: set[int]()}
    for entry in plan.entries:
        found[entry.site.role in ATTENTION_ROLES].add(entry.rank)
    assert found == {True: attention, False: others}
    assert plan.budget == 3_145_728


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_lr_only_is_uniform_with_the_ranks_as_rates(wrapped: str) -> None:
    plain, rates = plan_of(wrapped), plan_of(of("lr_only", wrapped))
    uniform = {entry.rank for entry in rates.entries}
    assert max(uniform) - min(uniform) <= 1
    for entry, source in zip(rates.entries, plain.entries, strict=True):
        assert entry.lr_multiplier == source.rank / entry.rank
    assert rates.lr_multipliers()
    assert RankPlan.from_dict(rates.to_dict()) == rates


def test_lr_only_trains_at_its_rates(make_bench: Callable[..., StudyContext], tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=2 lr_only:of=linear_decay,rank=3,low_rank=1", seeds="0", max_steps=2)
    uniform, rates = (run_trial(context, trial, tmp_path / trial.method.name) for trial in context.config.trials())
    assert rates.plan.rank_pattern() == uniform.plan.rank_pattern()
    assert {entry.lr_multiplier for entry in rates.plan.entries} == {0.5, 1.0, 1.5}
    assert rates.train.losses[0] == uniform.train.losses[0]
    assert rates.train.losses[1] != uniform.train.losses[1]


def test_a_trial_saves_its_certificate(make_bench: Callable[..., StudyContext], tmp_path: Path) -> None:
    context = make_bench(methods="waterfill:rank=2,abstain=1000", seeds="0", max_steps=1)
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    saved = RankPlan.from_dict(json.loads((tmp_path / "adapter" / "rank_plan.json").read_text()))
    assert saved == outcome.plan
    assert saved.certificate is not None
    metrics = trial_metrics(context, outcome, 0)
    assert metrics["plan/headroom"] == saved.certificate.headroom
    assert metrics["plan/abstained"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random:of=empirical,rank=0", "random: rank must be at least 1"),
        ("random:of=emprical", "random: of: unknown method 'emprical'; did you mean 'empirical'"),
        ("random:of=inverse", "unknown method 'inverse'"),
        ("random:of=truncate", "unknown method 'truncate'"),
        ("random:of=uniform,low_rank=4", "unknown option of random 'low_rank'"),
        ("uniform:of=empirical", "unknown option of uniform 'of'"),
        ("random:of=empirical,of=uniform", "option 'of' is given twice"),
        ("family_uniform:ratio=0", "above 0"),
        ("proportional:p=0", "above 0"),
        ("uniform:min_rank=-1", "at least 0"),
    ],
)
def test_bad_controls_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSpec.parse(text)


def test_labels_name_the_wrapped_method_and_the_limits() -> None:
    labels = {
        "random:of=waterfill,rank=8": "random-waterfill-r8",
        "inverse:of=linear_decay": "inverse-linear_decay-r16-4",
        "lr_only:of=empirical,rank=8": "lr_only-empirical-r8",
        "family_uniform:ratio=0.5,rank=8": "family_uniform-r8-0.5to1",
        "proportional:rank=8,p=3": "proportional-r8-p3",
        "waterfill:rank=8,abstain=0.02": "waterfill-r8-ab0.02",
        "uniform:min_rank=2,max_rank=64,multiple=8,attention_cap=32,feed_forward_cap=16": (
            "uniform-r16-min2-max64-x8-att32-ff16"
        ),
    }
    assert {text: MethodSpec.parse(text).label for text in labels} == labels


@pytest.mark.parametrize("control", ["random", "inverse", "lr_only"])
def test_controls_round_trip(control: str) -> None:
    spec = MethodSpec.parse(f"{control}:of=proportional,p=3,metric=gradient_norm,budget=uniform-4")
    assert spec.options.metric == "gradient_norm"
    values = spec.to_dict()
    assert values["of"] == "proportional"
    assert MethodSpec.build(values.pop("name"), values) == spec
