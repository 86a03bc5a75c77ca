"""Variants of LoRA under any allocation: counted exactly, built and trained as published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation_cases import DIALOGPT_MEDIUM, NEEDED, evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from tracked import quiet, store_in
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import METHODS, MethodSpec, RankPlan, allocate, uniform_cost
from adaptive_lora.config import StudyConfig
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters import attach, audit_as_built, detach
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import load_adapter
from adaptive_lora.training.trainer import parameter_groups

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)
OUTPUTS = sum(site.out_features for site in DIALOGPT_MEDIUM)


def planned(text: str, **options: Any) -> RankPlan:
    """Allocate on DialoGPT-medium."""
    return allocate(MethodSpec.parse(text), DIALOGPT_MEDIUM, **options)


# --- options


def test_variants_stand_in_label_and_identity_only_where_used() -> None:
    plain = MethodSpec.parse("uniform:rank=8")
    assert not {"dora", "scaling", "lora_plus"} & set(plain.to_dict())
    all_three = MethodSpec.parse("uniform:rank=8,dora=true,scaling=rslora,lora_plus=16")
    assert all_three.label == "uniform-r8-dora-rslora-plus16"
    values = all_three.to_dict()
    assert (values["dora"], values["scaling"], values["lora_plus"]) == (True, "rslora", 16.0)
    name = values.pop("name")
    assert MethodSpec.build(name, values) == all_three


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adalora:dora=true", "PEFT's AdaLoRA has no magnitudes"),
        ("adalora:lora_plus=16", "a B that starts at zero"),
        ("uniform:lora_plus=0", "must be above 0"),
        ("uniform:scaling=rs", "must be one of standard, rslora, constant"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSpec.parse(text)


def test_a_scaling_of_its_own_goes_over_the_studys() -> None:
    plan = planned("uniform:rank=4,scaling=rslora", scaling="standard")
    assert {plan.scale_of(entry) for entry in plan.entries} == {16.0}  # 32 / sqrt(4)
    plan = planned("uniform:rank=4,scaling=rslora,alpha=8", alpha=64.0)
    assert {plan.scale_of(entry) for entry in plan.entries} == {4.0}  # 8 / sqrt(4)
    assert plan.method == "uniform-r4-alpha8-rslora"


# --- counting


def test_magnitudes_are_counted() -> None:
    plan = planned("uniform:rank=8,dora=true")
    assert plan.trainable_parameters == 3_145_728 + OUTPUTS
    assert plan.magnitudes == OUTPUTS == 24 * (3 + 1 + 4 + 1) * 1024
    assert RankPlan.from_dict(plan.to_dict()) == plan


def test_a_methods_own_budget_is_one_of_ranks() -> None:
    found = evidence(DIALOGPT_MEDIUM)
    with_dora = planned("waterfill:rank=8,dora=true", profile=found)
    assert with_dora.rank_pattern() == planned("waterfill:rank=8", profile=found).rank_pattern()
    assert with_dora.budget == 3_145_728 + OUTPUTS


PLANNED = [n for n, kind in METHODS.items() if n != "adalora" and kind.gives_ranks]


@pytest.mark.parametrize("name", PLANNED)
@settings(max_examples=4)
@given(budget=st.integers(1_000_000, 6_000_000))
def test_a_named_budget_covers_magnitudes_and_is_spent(name: str, budget: int) -> None:
    least = {} if METHODS[name].least_rank is None else {"min_rank": 1}
    options = {"dora": "true", "budget": str(budget), **least, **NEEDED.get(name, {})}
    plan = allocate(MethodSpec.build(name, options), DIALOGPT_MEDIUM, profile=evidence(DIALOGPT_MEDIUM))
    assert plan.budget == budget
    assert plan.magnitudes == OUTPUTS
    assert 0 <= budget - plan.trainable_parameters < 5 * 1024


def test_sites_that_are_left_out_pay_no_magnitudes() -> None:
    text = "waterfill:rank=8,min_rank=0,dora=true,budget=400000"
    plan = planned(text, profile=evidence(DIALOGPT_MEDIUM))
    assert plan.left_out
    assert plan.magnitudes == sum(entry.site.out_features for entry in plan.entries) < OUTPUTS
    assert 0 <= 400_000 - plan.trainable_parameters < 5 * 1024


def test_budgets_that_magnitudes_alone_exceed() -> None:
    with pytest.raises(AllocationError, match="its magnitudes alone cost 221,184"):
        planned("uniform:dora=true,budget=200000")
    with pytest.raises(AllocationError, match="a control arm with dora needs a rank of 1 or more"):
        planned("random:of=waterfill,min_rank=0,dora=true,budget=400000", profile=evidence(DIALOGPT_MEDIUM))


# --- as built


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
@pytest.mark.parametrize("method", ["uniform:rank=3", "linear_decay:rank=5,low_rank=1,scaling=rslora"])
def test_dora_is_built_as_planned_and_starts_as_the_base(
    make_bench: BaseContext, base: str, method: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    context = make_bench(methods=f"{method},dora=true", model=str(folder))
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    before = context.base.model(IDS).logits
    adapted = attach(context.base.model, plan, seed=0, dropout=0.1).eval()
    audit_as_built(adapted, plan)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == plan.trainable_parameters > uniform_cost(context.sites, 1)
    assert torch.equal(adapted(IDS).logits, before)
    detach(adapted)
    assert torch.equal(context.base.model(IDS).logits, before)


def test_a_plan_without_dora_is_not_what_a_dora_model_is(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=2,dora=true uniform:rank=2")
    dora, plain = (context.plan(spec, seed=0, fold=0) for spec in context.config.specs)
    adapted = attach(context.base.model, dora, seed=0, dropout=0.0)
    with pytest.raises(AdapterError, match=r"shape of DoRA's magnitudes is \(96,\), planned None"):
        audit_as_built(adapted, plain)
    detach(adapted)


def test_dora_computes_the_published_formula(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=2,dora=true,alpha=4")
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0).eval()
    numbers = torch.Generator().manual_seed(0)
    for layer in lora_layers(adapted).values():
        w = layer.get_base_layer().weight.T.double()  # Conv1D holds (in, out)
        b, m = layer.lora_B[ADAPTER].weight, layer.lora_magnitude_vector[ADAPTER].weight
        torch.testing.assert_close(m, w.norm(dim=1).float())
        with torch.no_grad():
            b.normal_(generator=numbers)
            m.mul_(1 + torch.rand(m.shape, generator=numbers))
        x = torch.randn(5, layer.in_features, generator=numbers)
        v = w + 2.0 * b.double() @ layer.lora_A[ADAPTER].weight.double()  # eq. 5 of 2402.09353
        direct = x.double() @ (m.double()[:, None] * v / v.norm(dim=1, keepdim=True)).T
        direct = direct + layer.get_base_layer().bias.double()
        torch.testing.assert_close(layer(x), direct.float(), rtol=1e-4, atol=1e-4)
    detach(adapted)


# --- training


def test_lora_plus_is_a_rate_of_b(make_bench: BaseContext) -> None:
    context = make_bench(methods="lr_only:of=linear_decay,rank=4,low_rank=1,lora_plus=16,dora=true")
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    groups = parameter_groups(adapted, plan.lr_multipliers(), 0.5, lora_plus=plan.lora_plus)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == len([p for p in adapted.parameters() if p.requires_grad])
    for name, layer in lora_layers(adapted).items():
        own = 0.5 * plan.lr_multipliers().get(name, 1.0)
        assert rate[id(layer.lora_A[ADAPTER].weight)] == own
        assert rate[id(layer.lora_magnitude_vector[ADAPTER].weight)] == own
        assert rate[id(layer.lora_B[ADAPTER].weight)] == 16 * own
    detach(adapted)


def test_one_step_moves_b_sixteen_times_as_far(make_bench: BaseContext, tmp_path: Path) -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    context = make_bench(methods="uniform:rank=2,lora_plus=16", seeds="0", max_steps=1, warmup_share=0, lr="1e-3")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, _, _ = load_adapter(outcome.folder)
    for layer in lora_layers(model).values():
        moved = layer.lora_B[ADAPTER].weight.abs().max()
        torch.testing.assert_close(moved, torch.tensor(16e-3), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    "method",
    [
        "uniform:rank=2,dora=true,scaling=rslora,lora_plus=4",
        "waterfill:rank=2,min_rank=0,dora=true",
        "eva:rank=2,dora=true",
        "gora:rank=2,dora=true,lora_plus=4",
        "truncate:rank=2,dora=true",
        "truncate_retrain:rank=2,dora=true,lora_plus=4",
        "grow_prune:rank=2,dora=true,lora_plus=4,interval=1",
        "adalora:rank=2,scaling=rslora",
    ],
)
def test_any_allocation_goes_with_any_variant(make_bench: BaseContext, tmp_path: Path, method: str) -> None:
    context = make_bench(methods=method, seeds="0", max_steps=8, profile_batches=2)
    trial = next(context.config.trials())
    outcome = run_trial(context, trial, tmp_path / "adapter")
    budget = outcome.plan.budget
    assert budget is None or outcome.plan.trainable_parameters <= budget
    assert outcome.plan.dora == ("dora" in method)
    model, _, _ = load_adapter(outcome.folder)
    again = context.losses(model, context.splits(0).test)
    assert (again.nll_E == outcome.test.nll_E).all()
    assert outcome.test.loss < context.base_scores(0).loss


# --- what becomes of it


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
def test_dora_is_exported_merged_and_refused_for_servers(
    make_bench: BaseContext, tmp_path: Path, base: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    context = make_bench(methods="three_band:rank=4,dora=true", model=str(folder), seeds="0")
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"no plain LoRA adapter \(use_dora=True\).*--merged"):
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "magnitude" in card
    model, _, _ = load_adapter(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_dora_adapter_is_proven_and_registered(in_store: Callable[..., StudyConfig], tmp_path: Path) -> None:
    config = in_store(methods="uniform:rank=2,dora=true,lora_plus=8", seeds="0 1")
    outcome, _ = quiet(config)
    champion = outcome.study_result.champion
    assert champion is not None
    found = outcome.store.client.get_model_version_by_alias("adaptive-lora", "champion")
    assert found.tags["method"] == "uniform-r2-dora-plus8"
    assert store_in(tmp_path) == config.tracking.tracking_uri
