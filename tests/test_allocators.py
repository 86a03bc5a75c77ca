"""What holds for every allocator of the catalogue, whatever the sites, limits and budget."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from allocation_cases import DIALOGPT_MEDIUM, NEEDED, evidence, gpt2_sites
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lora.allocation import METHODS, MethodSpec, ProfileSummary, RankPlan, allocate, uniform_cost
from adaptive_lora.allocation.site import ATTENTION_ROLES, FEED_FORWARD_ROLES, AdapterSite, Role
from adaptive_lora.allocation.spec import LIMITS
from adaptive_lora.errors import AllocationError, ConfigError

PLANNED = sorted(name for name, kind in METHODS.items() if kind.gives_ranks and not kind.ranks_in_training)
every_method = pytest.mark.parametrize("name", PLANNED)

site_rows = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([Role.QUERY, Role.OUTPUT, Role.UP, Role.DOWN]),
        st.sampled_from([32, 64, 96]),
        st.sampled_from([32, 64, 96]),
    ),
    min_size=2,
    max_size=8,
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "min_rank": st.integers(1, 4),
        "max_rank": st.integers(8, 24),
        "multiple": st.sampled_from([1, 2, 4, 8]),
        "attention_cap": st.integers(8, 16),
        "feed_forward_cap": st.integers(8, 16),
    },
)


def made(rows: list[tuple[int, Role, int, int]]) -> tuple[AdapterSite, ...]:
    """Return sites of these layers, roles and widths."""
    return tuple(
        AdapterSite(name=f"h.{layer}.{role}{number}", layer=layer, role=role, in_features=inner, out_features=outer)
        for number, (layer, role, inner, outer) in enumerate(rows)
    )


site_lists = site_rows.map(made)


def plan_of(name: str, sites: Sequence[AdapterSite], options: dict[str, Any], evidence: ProfileSummary) -> RankPlan:
    """Allocate with a method and options, at least rank 1 at every site and, if planted, more at each."""
    if METHODS[name].least_rank is not None:
        options = {"min_rank": 1, **options}
    if name == "planted":
        options = {"pattern": "random", **options}
    if name == "given":
        options = {"ranks": [f"{site.name}=8" for site in sites], **options}
    return allocate(MethodSpec.build(name, options), sites, profile=evidence, seed=3)


def most_of(site: AdapterSite, options: dict[str, Any]) -> int:
    """Return the greatest rank that the options allow a site."""
    caps = [site.max_rank, options.get("max_rank", site.max_rank)]
    if site.role in ATTENTION_ROLES:
        caps.append(options.get("attention_cap", site.max_rank))
    if site.role in FEED_FORWARD_ROLES:
        caps.append(options.get("feed_forward_cap", site.max_rank))
    return min(caps) // options.get("multiple", 1) * options.get("multiple", 1)


@every_method
@settings(max_examples=30)
@given(sites=site_lists, options=limits, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_budget_is_spent_within_the_limits(
    name: str, sites: tuple[AdapterSite, ...], options: dict[str, Any], share: float, seed: int
) -> None:
    multiple = options.get("multiple", 1)
    least = -(-options.get("min_rank", 1) // multiple) * multiple
    low = uniform_cost(sites, least)
    high = sum(most_of(site, options) * site.parameters_per_rank for site in sites)
    budget = low + int(share * (high - low))
    plan = plan_of(name, sites, {**options, "budget": str(budget)}, evidence(sites, seed))
    assert plan.trainable_parameters <= budget
    slack = budget - plan.trainable_parameters
    uniform = budget / sum(site.parameters_per_rank for site in sites)
    own = 4 * uniform if name in ("empirical", "gora", "random") else math.inf  # GoRA's limit
    for entry in plan.entries:
        assert least <= entry.rank <= most_of(entry.site, options)
        assert entry.rank % multiple == 0
        if entry.rank < min(own, most_of(entry.site, options)):
            assert slack < entry.site.parameters_per_rank * multiple
    assert [entry.site for entry in plan.entries] == list(sites)


@every_method
@settings(max_examples=30)
@given(sites=site_lists, options=limits)
def test_limits_hold_without_a_budget(name: str, sites: tuple[AdapterSite, ...], options: dict[str, Any]) -> None:
    if "rank" in METHODS[name].__dataclass_fields__ or name in ("random", "inverse", "lr_only"):
        options = {**options, "rank": 8}  # within every limit that is drawn
    plan = plan_of(name, sites, options, evidence(sites))
    for entry in plan.entries:
        assert options.get("min_rank", 1) <= entry.rank <= most_of(entry.site, options)
        assert entry.rank % options.get("multiple", 1) == 0


@every_method
@settings(max_examples=30)
@given(order=st.permutations(range(16)), seed=st.integers(0, 9))
def test_the_order_of_sites_does_not_matter(name: str, order: list[int], seed: int) -> None:
    sites = gpt2_sites(4, 64)
    measured = evidence(sites, seed)
    options = {"budget": "40000"}
    straight = plan_of(name, sites, options, measured)
    shuffled = plan_of(name, [sites[index] for index in order], options, measured)
    assert {e.site.name: e for e in straight.entries} == {e.site.name: e for e in shuffled.entries}
    assert [entry.site for entry in shuffled.entries] == [sites[index] for index in order]


@pytest.mark.parametrize("name", ["empirical", "proportional", "waterfill"])
@given(seed=st.integers(0, 99), budget=st.integers(20_000, 60_000))
def test_more_important_sites_of_equal_cost_get_no_less(name: str, seed: int, budget: int) -> None:
    sites = gpt2_sites(6, 64)
    measured = evidence(sites, seed)
    ordered = ProfileSummary(
        metric="whitened_gradient",
        scores=measured.scores,
        spectra={name: tuple(s / i for i in range(1, 33)) for name, s in measured.scores.items()},
    )
    ranks = plan_of(name, sites, {"budget": str(budget)}, ordered).rank_pattern()
    for one, other in product(sites, repeat=2):
        if one.parameters_per_rank == other.parameters_per_rank and (
            ordered.scores[one.name] > ordered.scores[other.name]
        ):
            assert ranks[one.name] >= ranks[other.name]


@pytest.mark.parametrize("name", [name for name in PLANNED if name != "domlora"])
def test_equal_evidence_gives_uniform(name: str) -> None:
    """Equal per parameter, because parameters are the budget."""
    scores = {site.name: 0.3 * site.parameters_per_rank for site in DIALOGPT_MEDIUM}
    spectra = {key: tuple(value / i for i in range(1, 40)) for key, value in scores.items()}
    measured = ProfileSummary(metric="whitened_gradient", scores=scores, spectra=spectra, replicates=(spectra,) * 3)
    options: dict[str, Any] = {"rank": 8}
    if METHODS[name](**NEEDED.get(name, {})).metric is None and name != "uniform":
        pytest.skip("looks at no evidence")
    if name == "gora":
        pytest.skip("divides by the root of the cost, as its paper does")
    plan = plan_of(name, DIALOGPT_MEDIUM, options, measured)
    assert {entry.rank for entry in plan.entries} == {8}
    assert {entry.lr_multiplier for entry in plan.entries} == {1.0}
    if plan.certificate is not None:
        assert plan.certificate.headroom == pytest.approx(0)
        assert plan.certificate.headroom_lower == pytest.approx(0)


@every_method
def test_options_round_trip(name: str) -> None:
    shared = {"budget": "uniform-8", "multiple": 8, "max_rank": "64", "target_names": ["c_fc", "c_proj"]}
    spec = MethodSpec.build(name, {**shared, **NEEDED.get(name, {})})
    values = spec.to_dict()
    again = MethodSpec.build(values.pop("name"), values)
    assert again == spec
    assert again.label == spec.label


@pytest.mark.parametrize("name", sorted(METHODS))
def test_resolved_defaults_round_trip(name: str) -> None:
    spec = MethodSpec.build(name, NEEDED.get(name, {}))
    values = json.loads(json.dumps(spec.to_dict()))
    assert MethodSpec.build(values.pop("name"), values) == spec


def test_no_limit_is_the_default_of_the_specification() -> None:
    spec = MethodSpec.parse("uniform")
    assert {limit: getattr(spec, limit) for limit in LIMITS} == LIMITS


@pytest.mark.parametrize("name", ["adalora", "grow_prune"])
def test_methods_that_decide_in_training_refuse_limits(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot keep max_rank, multiple"):
        MethodSpec.parse(f"{name}:rank=8,max_rank=16,multiple=8")


def test_rank_zero_leaves_sites_out() -> None:
    sites = gpt2_sites(4, 64)
    measured = evidence(sites)
    strong = {name: value**4 for name, value in measured.scores.items()}
    plan = plan_of(
        "proportional",
        sites,
        {"min_rank": 0, "p": 1, "budget": "uniform-2"},
        dataclasses.replace(measured, scores=strong),
    )
    assert plan.left_out
    assert {entry.site.name for entry in plan.entries} | set(plan.left_out) == {site.name for site in sites}
    assert all(entry.rank > 0 for entry in plan.entries)
    assert RankPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:multiple=2048", "no rank is allowed at transformer.h.0.attn.c_attn"),
        ("uniform:min_rank=8,attention_cap=4", "multiple of 1 from 8 to 4"),
        ("waterfill:rank=16,max_rank=8", "cannot be used"),
        ("waterfill:rank=4,multiple=8", "too small"),
        ("lr_only:of=proportional,p=0.05,min_rank=0,rank=1", "lr_only needs a rank of 1 or more"),
        ("proportional:min_rank=0,budget=100", "no site a rank"),
    ],
)
def test_limits_that_cannot_be_met(text: str, message: str) -> None:
    spec = MethodSpec.parse(text)
    with pytest.raises(AllocationError, match=message):
        allocate(spec, DIALOGPT_MEDIUM, profile=evidence(DIALOGPT_MEDIUM))


def test_ranks_without_a_budget_are_cut_and_rounded_down() -> None:
    def ranks(text: str) -> set[int]:
        spec = MethodSpec.parse(text)
        return {entry.rank for entry in allocate(spec, DIALOGPT_MEDIUM).entries}

    assert ranks("uniform:rank=20,multiple=8") == {16}
    assert ranks("uniform:rank=20,attention_cap=6") == {6, 20}
    assert ranks("attention_heavy:rank=16,feed_forward_cap=4") == {16, 4}
    assert ranks("linear_decay:min_rank=10,max_rank=12") == {10, 11, 12}
    assert ranks("uniform:rank=2000,max_rank=1000") == {1000}
