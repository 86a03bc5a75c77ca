"""Ranks from a nuclear-norm penalty, and the budget at one site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_recipes import run

from adaptive_lora.allocation import MethodSpec, allocate, uniform_cost
from adaptive_lora.allocation.request import ProfileSummary
from adaptive_lora.allocation.site import Role
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.attach import ADAPTER, attach, detach, lora_layers
from adaptive_lora.methods.nuclear.fit import NuclearPenalty, reweighted_prices
from adaptive_lora.runner.context import StudyContext

MakeContext = Callable[..., StudyContext]
TEACHER = "planted:pattern=one_family,budget=uniform-2,distance=0.005,length=8,texts=60"


def test_the_least_penalty_of_an_update_is_its_nuclear_norm(make_bench: MakeContext) -> None:
    """Recht, Fazel & Parrilo 2010, lemma 5.1, for the factors that a model really has."""
    context = make_bench(methods="uniform:rank=2")
    plan = allocate(MethodSpec.parse("uniform:rank=2"), context.sites)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    try:
        norms = 0.0
        prices = {site.name: 0.5 + index for index, site in enumerate(context.sites)}
        generator = torch.Generator().manual_seed(0)
        for name, layer in lora_layers(adapted).items():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            with torch.no_grad():
                u, values, v = torch.linalg.svd(torch.randn(b.shape[0], a.shape[1], generator=generator))
                b.copy_(u[:, :2] * values[:2].sqrt())
                a.copy_(values[:2].sqrt()[:, None] * v[:2])
            norms += prices[name] * layer.scaling[ADAPTER] * float(values[:2].sum())
        penalty = NuclearPenalty(adapted, prices)
        assert penalty.penalty().item() == pytest.approx(norms, rel=1e-5)
        for layer in lora_layers(adapted).values():  # the same updates from unbalanced factors
            with torch.no_grad():
                layer.lora_A[ADAPTER].weight.mul_(2)
                layer.lora_B[ADAPTER].weight.div_(2)
        assert penalty.penalty().item() == pytest.approx(norms * (4 + 1 / 4) / 2, rel=1e-5)
    finally:
        detach(adapted)


def test_prices_follow_parameters_and_fall_with_what_a_site_has_learned(make_bench: MakeContext) -> None:
    sites = make_bench(methods="uniform:rank=2").sites
    first = reweighted_prices(sites, 0.1)
    assert sum(first.values()) / len(first) == pytest.approx(0.1)
    for site in sites:
        assert first[site.name] / first[sites[0].name] == pytest.approx(
            site.parameters_per_rank / sites[0].parameters_per_rank
        )
    norms = {site.name: 1.0 + index for index, site in enumerate(sites)} | {sites[0].name: 0.0}
    again = reweighted_prices(sites, 0.1, norms)
    ratios = {name: again[name] / first[name] for name in first}
    assert ratios[sites[0].name] == pytest.approx(5.0)  # 1 / 0.2 where nothing was learned
    assert sorted(ratios.values(), reverse=True) == list(ratios.values())
    assert reweighted_prices(sites, 0.1, dict.fromkeys(norms, 0.0)) == first


def test_the_ranks_of_the_best_round_are_kept_with_their_weights(make_bench: MakeContext, tmp_path: Path) -> None:
    methods = "uniform:budget=uniform-2 nuclear_retrain:budget=uniform-2,rounds=2"
    context = make_bench(data=TEACHER, methods=methods, seeds="0", max_steps=30, epochs=20, lr="1e-2")
    uniform, found = run(context, tmp_path)
    assert found.trainings == 5
    assert found.plan.trainable_parameters <= uniform_cost(context.sites, 2)
    assert found.training_parameters == uniform_cost(context.sites, 8)
    gain = found.extra["nuclear/gain_on_validation"]
    assert gain >= 0
    assert uniform.train.validation_loss - found.train.validation_loss == pytest.approx(gain, abs=1e-6)
    assert (found.extra["nuclear/round"] > 0) is (found.plan.rank_pattern() != uniform.plan.rank_pattern())
    assert found.search_seconds > found.train.seconds
    assert [event.step for event in found.history] == [0, 120]


def test_a_penalty_that_leaves_nothing_keeps_uniform(make_bench: MakeContext, tmp_path: Path) -> None:
    """Ranks of noise are no better on validation data than uniform ones."""
    method = "nuclear_retrain:budget=uniform-2,rounds=1,penalty=1000,min_rank=2"
    context = make_bench(methods=f"uniform:budget=uniform-2 {method}", seeds="0", max_steps=6, epochs=3)
    uniform, found = run(context, tmp_path)
    assert found.plan.rank_pattern() == uniform.plan.rank_pattern()
    assert found.extra["nuclear/round"] == 0
    assert found.test.nll_E.tolist() == uniform.test.nll_E.tolist()


def test_domlora_spends_the_budget_at_the_site_of_most_energy(make_bench: MakeContext) -> None:
    context = make_bench(methods="uniform:rank=2")
    budget = uniform_cost(context.sites, 2)
    wanted = next(site for site in context.sites if site.role is Role.DOWN)
    other = next(site for site in context.sites if site.role is Role.UP)
    scores = dict.fromkeys((site.name for site in context.sites), 1e-3)
    scores |= {wanted.name: 2.0 * wanted.in_features**0.5, other.name: 1.9 * other.in_features**0.5}
    profile = ProfileSummary(metric="gradient_norm", scores=scores)
    plan = allocate(MethodSpec.parse("domlora:budget=uniform-2"), context.sites, profile=profile)
    ranks = plan.rank_pattern()
    assert ranks[wanted.name] == min(wanted.max_rank, budget // wanted.parameters_per_rank)
    capped = allocate(MethodSpec.parse("domlora:budget=uniform-2,max_rank=3"), context.sites, profile=profile)
    assert capped.rank_pattern()[wanted.name] == capped.rank_pattern()[other.name] == 3
    assert budget - capped.trainable_parameters < max(site.parameters_per_rank for site in context.sites)
    with pytest.raises(AllocationError, match="needs a gradient_norm profile"):
        allocate(MethodSpec.parse("domlora:rank=2"), context.sites)


def test_single_site_keeps_the_best_of_its_candidates(make_bench: MakeContext, tmp_path: Path) -> None:
    names = make_bench(methods="uniform:rank=2").sites
    methods = f"domlora:rank=1 single_site:rank=1,candidates=1 single_site:rank=1,candidates={len(names)}"
    context = make_bench(methods=methods, seeds="0", max_steps=6, epochs=3, lr="3e-2")
    dominant, first, best = run(context, tmp_path)
    assert first.plan.rank_pattern() == dominant.plan.rank_pattern()
    assert first.test.nll_E.tolist() == dominant.test.nll_E.tolist()
    assert best.trainings == len(names)
    assert best.train.validation_loss <= first.train.validation_loss
    assert max(best.plan.rank_pattern().values()) > 1
    with pytest.raises(AllocationError, match=f"at most {len(names)} candidates"):
        make_bench(methods=f"single_site:rank=1,candidates={len(names) + 1}", seeds="0")
