"""Water-filling: the best ranks, its certificate, and when it abstains."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import product
from typing import Any

import pytest
from allocation_cases import DIALOGPT_MEDIUM, evidence, gpt2_sites
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lora.allocation import MethodSpec, ProfileSummary, RankPlan, allocate, uniform_cost
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError, ConfigError

Spectra = dict[str, tuple[float, ...]]


def plan_of(sites: tuple[AdapterSite, ...], known: ProfileSummary | None, **options: Any) -> RankPlan:
    """Allocate by waterfill."""
    return allocate(MethodSpec.build("waterfill", options), sites, profile=known)


def captured(plan: RankPlan, spectra: Any) -> float:
    """Return the sum of the spectra up to the plan's ranks."""
    return sum(sum(spectra[entry.site.name][: entry.rank]) for entry in plan.entries)


def test_sites_that_gain_more_per_parameter_get_more() -> None:
    sites = gpt2_sites(1, 8)  # costs 32, 16, 40, 40
    known = {
        sites[0].name: (3.2, 1.6, 0.1),
        sites[1].name: (1.6, 0.1, 0.1),
        sites[2].name: (4.0, 3.0, 2.0),
        sites[3].name: (0.4, 0.1, 0.1),
    }
    plan = plan_of(
        sites,
        ProfileSummary(metric="whitened_gradient", scores={}, spectra=known),
        budget=str(32 * 2 + 16 * 1 + 40 * 3 + 40 * 1),
    )
    assert [entry.rank for entry in plan.entries] == [2, 1, 3, 1]
    assert plan.certificate is not None
    assert plan.certificate.gap == 0
    assert plan.certificate.captured == pytest.approx(3.2 + 1.6 + 1.6 + 9.0 + 0.4)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), multiple=st.sampled_from([1, 2]))
def test_no_other_ranks_capture_more(seed: int, share: float, multiple: int) -> None:
    """Every combination of ranks under the limits, on four sites of three different costs."""
    sites, known = gpt2_sites(1, 8), evidence(gpt2_sites(1, 8), seed)
    assert known.spectra is not None
    low, high = uniform_cost(sites, 2), uniform_cost(sites, 6)
    budget = low + int(share * (high - low))
    plan = plan_of(sites, known, budget=str(budget), min_rank=2, max_rank=6, multiple=multiple)
    best = max(
        sum(sum(known.spectra[s.name][:r]) for s, r in zip(sites, ranks, strict=True))
        for ranks in product(range(2, 7, multiple), repeat=4)
        if sum(s.parameters_per_rank * r for s, r in zip(sites, ranks, strict=True)) <= budget
    )
    proof = plan.certificate
    assert proof is not None
    assert proof.optimal
    assert proof.captured == pytest.approx(best)
    assert proof.captured == pytest.approx(captured(plan, known.spectra))
    assert proof.bound >= proof.captured >= proof.uniform * (1 - 1e-12)


@settings(max_examples=15)
@given(seed=st.integers(0, 999), budget=st.integers(150_000, 4_000_000))
def test_certificate_is_consistent(seed: int, budget: int) -> None:
    sites = gpt2_sites(12, 768)
    known = evidence(sites, seed)
    plan = plan_of(sites, known, budget=str(budget))
    uniform = allocate(MethodSpec.build("uniform", {"budget": str(budget)}), sites)
    proof = plan.certificate
    assert proof is not None
    assert proof.captured == proof.best == pytest.approx(captured(plan, known.spectra))
    assert proof.uniform == pytest.approx(captured(uniform, known.spectra))
    assert proof.bound >= proof.best >= proof.uniform * (1 - 1e-12)
    assert proof.headroom == pytest.approx(proof.best / proof.uniform - 1)
    assert not proof.abstained
    beyond = [max(0, entry.rank - 48) * entry.site.parameters_per_rank for entry in plan.entries]
    assert proof.idle_parameters == sum(beyond)
    assert RankPlan.from_dict(json.loads(plan.to_json())) == plan


def noise(sites: tuple[AdapterSite, ...], seed: int) -> Spectra:
    """Return spectra whose differences between sites are chance."""
    draw = random.Random(seed)
    return {
        site.name: tuple(sorted((draw.expovariate(1) * site.parameters_per_rank for _ in range(16)), reverse=True))
        for site in sites
    }


def test_headroom_of_noise_is_seen_through() -> None:
    """Ranks chosen on noise look good on the same noise, and not on other noise."""
    sites = gpt2_sites(12, 64)
    known = ProfileSummary(
        metric="whitened_gradient",
        scores={},
        spectra=noise(sites, 0),
        replicates=tuple(noise(sites, seed) for seed in range(1, 9)),
    )
    proof = plan_of(sites, known, rank=4).certificate
    assert proof is not None
    assert proof.headroom > 0.03
    assert proof.headroom_lower is not None
    assert proof.headroom_lower < 0
    abstained = plan_of(sites, known, rank=4, abstain=0.0)
    assert {entry.rank for entry in abstained.entries} == {4}
    assert abstained.certificate is not None
    assert abstained.certificate.abstained
    assert abstained.certificate.captured == abstained.certificate.uniform
    assert abstained.certificate.best == proof.best
    assert any("abstained" in line for line in abstained.certificate.sentences())
    assert RankPlan.from_dict(json.loads(abstained.to_json())) == abstained


def test_real_headroom_is_used() -> None:
    known = evidence(DIALOGPT_MEDIUM)
    plan = plan_of(DIALOGPT_MEDIUM, known, rank=8, abstain=0.01)
    proof = plan.certificate
    assert proof is not None
    assert not proof.abstained
    assert 0.01 < (proof.headroom_lower or 0) <= proof.headroom + 0.05
    assert len({entry.rank for entry in plan.entries}) > 3
    assert plan.trainable_parameters == 8 * 24 * 16 * 1024  # the divisor 2,048 divides the budget


def test_ranks_beyond_the_spectra_are_spread_evenly() -> None:
    sites = gpt2_sites(3, 64)
    spectra = {site.name: (1.0, 0.5) for site in sites}
    known = ProfileSummary(metric="whitened_gradient", scores={}, spectra=spectra)
    plan = plan_of(sites, known, rank=8)
    assert {entry.rank for entry in plan.entries} == {8}
    assert plan.certificate is not None
    assert plan.certificate.idle_parameters == uniform_cost(sites, 6)
    assert any("spread evenly" in line for line in plan.certificate.sentences())


@pytest.mark.parametrize(
    ("values", "metric", "says"),
    [
        ((1.0, 0.5, 0.0), "whitened_gradient", "every component above the noise edge is covered by rank 2"),
        ((1.0, 0.5), "gradient_norm", "every component with a gain is covered by rank 2"),
        ((1.0, 0.5, 0.4, 0.1), "whitened_gradient", "proven optimal: uniform captures 100.0% of what any allocation"),
    ],
)
def test_uniform_ranks_say_why(values: tuple[float, ...], metric: str, says: str) -> None:
    sites = tuple(dataclasses.replace(site, out_features=64, in_features=64) for site in gpt2_sites(2, 64))
    spectra = {site.name: values for site in sites}
    plan = plan_of(sites, ProfileSummary(metric=metric, scores={}, spectra=spectra), rank=3)
    assert {entry.rank for entry in plan.entries} == {3}
    assert plan.certificate is not None
    assert says in plan.certificate.reason
    assert any(line.startswith("uniform ") and says[-20:] in line for line in plan.certificate.sentences())
    values_of = plan.certificate.to_dict()
    earlier = {key: value for key, value in values_of.items() if key not in ("everything", "covering_rank")}
    assert type(plan.certificate).from_dict(values_of) == plan.certificate
    assert type(plan.certificate).from_dict(earlier).reason == ""  # of a version that did not record it


def test_uneven_ranks_need_no_reason() -> None:
    plan = plan_of(DIALOGPT_MEDIUM, evidence(DIALOGPT_MEDIUM), rank=8)
    assert plan.certificate is not None
    assert plan.certificate.reason == ""


FOUR = gpt2_sites(1, 8)


def spectra_of(values: tuple[float, ...]) -> Spectra:
    """Return the same spectrum at every site."""
    return {site.name: values for site in FOUR}


@pytest.mark.parametrize(
    ("known", "options", "message"),
    [
        (None, {}, "none was given"),
        (ProfileSummary(metric="stable_rank", scores={}), {}, "Metrics that have one: .*whitened"),
        (ProfileSummary(metric="m", scores={}, spectra={}), {}, "do not hold transformer.h.0"),
        (ProfileSummary(metric="m", scores={}, spectra=spectra_of((0.0, 0.0))), {}, "degenerate"),
        (ProfileSummary(metric="m", scores={}, spectra=spectra_of((2.0, -1.0))), {}, "degenerate"),
        (ProfileSummary(metric="m", scores={}, spectra=spectra_of((float("nan"),))), {}, "degenerate"),
        (ProfileSummary(metric="m", scores={}, spectra=spectra_of((1.0, 2.0))), {}, "largest value first"),
        (
            ProfileSummary(metric="m", scores={}, spectra=spectra_of((1.0,)), replicates=({},)),
            {"abstain": 0.1},
            "2 or more subsets",
        ),
    ],
)
def test_evidence_that_will_not_do(known: ProfileSummary | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        plan_of(FOUR, known, rank=2, **options)


def test_metrics_without_a_spectrum_are_refused_when_read() -> None:
    with pytest.raises(ConfigError, match="metric must be one of"):
        MethodSpec.parse("waterfill:metric=weight_gradient")


def test_a_damaged_certificate_is_an_error() -> None:
    plan = plan_of(DIALOGPT_MEDIUM, evidence(DIALOGPT_MEDIUM), rank=8)
    values = json.loads(plan.to_json())
    del values["certificate"]["bound"]
    with pytest.raises(AllocationError, match="not a rank plan"):
        RankPlan.from_dict(values)


def test_replicates_without_any_signal_promise_nothing() -> None:
    sites = gpt2_sites(2, 64)
    known = evidence(sites)
    silent = {site.name: (0.0,) for site in sites}
    plan = plan_of(sites, dataclasses.replace(known, replicates=(silent, silent)), rank=4, abstain=0.01)
    assert plan.certificate is not None
    assert plan.certificate.headroom_lower == 0
    assert plan.certificate.abstained
