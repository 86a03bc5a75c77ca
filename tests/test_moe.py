"""Mixtures of experts: attention and shared experts, and routed experts by `experts=true`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import FROZEN, MIXTURES, save_mixture, settings_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_emit import emit

from adaptive_lora.allocation import MethodSpec, RankPlan, make_plan
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError, ModelError
from adaptive_lora.methods.adapters import audit_as_built
from adaptive_lora.methods.adapters.attach import attach, detach, lora_layers
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.models.sites import read_architecture, site_notes, survey_sites
from adaptive_lora.models.sites.experts import ROUTER
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import generate, load_adapter

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).view(2, 12)


def tiny(name: str) -> Any:
    """Build a small mixture of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(settings_of(name)).requires_grad_(False).eval()


@pytest.mark.parametrize("name", [*MIXTURES, *FROZEN])
def test_roles_and_what_stays_frozen(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings_of(name))
    survey = survey_sites(model)
    blocks = {**MIXTURES, **FROZEN}[name][2]
    for layer, roles in enumerate(blocks):
        assert " ".join(site.role for site in survey.sites if site.layer == layer) == roles
    assert set(survey.left_out.values()) <= {ROUTER}
    assert name in FROZEN or f"'{model.config.model_type}' is not among" not in " ".join(site_notes(model, survey))
    assert not [site.name for site in survey.sites if ".gate." in f".{site.name}." or "router" in site.name]
    stacked = {site.name: site for site in survey.experts}
    assert bool(stacked) == (name in MIXTURES)
    for site in stacked.values():
        shape = tuple(model.get_parameter(site.name).shape)
        assert (site.experts, {site.in_features, site.out_features}) == (4, set(shape[1:]))
        assert (site.active, site.parameters_per_rank) == (2, 4 * sum(shape[1:]))
    inside = [p.numel() for name, p in model.named_parameters() if "experts." in name.replace("shared_experts", "")]
    moe = name != "jetmoe"  # whose experts have other names
    assert not moe or f"({sum(inside):,} parameters)" in " ".join(site_notes(model, survey))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # a mistake of PEFT 0.21
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("method", ["uniform:rank=4", "uniform:rank=4,experts=true"])
def test_the_model_is_built_as_planned_and_given_back(name: str, method: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = model(IDS).logits
    base = read_architecture(model)
    plan = make_plan(MethodSpec.parse(method), base)
    assert isinstance(plan, RankPlan)
    experts = {entry.site.name: entry.rank for entry in plan.entries if entry.site.experts}
    assert set(experts) == ({site.name for site in base.experts} if "experts" in method else set())
    assert set(experts.values()) <= {2}  # rank 4 over 2 active experts
    adapted = attach(model, plan, seed=1, dropout=0.0)
    audit_as_built(adapted, plan)
    assert torch.equal(adapted(IDS).logits, before)
    adapted(IDS).logits.square().mean().backward()
    assert all(bool(layer.lora_B["default"].weight.grad.any()) for layer in lora_layers(adapted).values())
    detach(adapted)
    assert torch.equal(model(IDS).logits, before)
    emitted = make_config(adapted)
    assert RankPlan.from_dict(json.loads(plan.to_json())) == plan
    emitted.save_pretrained(tmp_path)
    stock = get_peft_model(model, LoraConfig.from_pretrained(str(tmp_path)))
    audit_as_built(stock, plan)


def make_config(adapted: Any) -> LoraConfig:
    """Return the configuration that a model was built by."""
    config: LoraConfig = adapted.peft_config["default"]
    return config


FAST = ("deepseek-v3", "gpt-oss")
every_family = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in MIXTURES]
)


@every_family
@pytest.mark.parametrize("method", ["uniform:rank=4", "waterfill:rank=4,experts=true"])
def test_planned_trained_reloaded_served_and_merged(
    name: str, method: str, make_bench: BaseContext, tmp_path: Path
) -> None:
    folder = save_mixture(name, tmp_path / "base")
    context = make_bench(methods=method, seeds="0", model=str(folder), max_steps=3, lr="1e-2")
    before = {name: tensor.clone() for name, tensor in context.base.model.state_dict().items()}
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.base.model.state_dict().items())
    assert isinstance(outcome.plan, RankPlan)
    assert any(entry.site.experts for entry in outcome.plan.entries) == ("experts" in method)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == outcome.plan.trainable_parameters
    model, tokenizer, _ = load_adapter(tmp_path / "adapter")
    probe = load_file(tmp_path / "adapter" / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), probe)
    assert len(generate(model, tokenizer, [[72, 101], [73, 74, 75]], max_new_tokens=3)) == 2
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    if "experts" in method:
        with pytest.raises(AdapterError, match="adapts routed experts"):
            export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    else:
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")
        same, _, _ = load_adapter(tmp_path / "uniform")
        with torch.no_grad():
            torch.testing.assert_close(same(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss"])
def test_profilers_see_each_expert_as_autograd_does(name: str, make_bench: BaseContext, tmp_path: Path) -> None:
    folder = save_mixture(name, tmp_path / "base")
    context = make_bench(methods="uniform:rank=2,experts=true", seeds="0", model=str(folder))
    task = context.profile_task(seed=0, fold=0, experts=True)
    found = {
        metric: context.profile(metric, seed=0, fold=0, experts=True) for metric in ("weight_gradient", "gradient_norm")
    }
    stack = next(site for site in task.sites if site.experts)
    parameter = context.base.model.get_parameter(stack.name).requires_grad_(True)
    kind, context.base.model.config._experts_implementation = context.base.model.config._experts_implementation, "eager"
    tokens = sum(batch.supervised_tokens for batch in task.batches)
    context.base.model.eval()
    for batch in task.batches:
        task.loss(context.base.model, batch).backward()
    context.base.model.config._experts_implementation = kind
    assert parameter.grad is not None
    gradient = parameter.grad / tokens
    parameter.requires_grad_(False)
    score = sum(float((each * weight).abs().mean()) for each, weight in zip(gradient, parameter, strict=True))
    assert found["weight_gradient"].scores[stack.name] == pytest.approx(score, rel=1e-4)
    norm = sum(float(each.norm()) for each in gradient)
    assert found["gradient_norm"].scores[stack.name] == pytest.approx(norm, rel=1e-4)
    spectra = found["gradient_norm"].spectra
    assert spectra is not None
    first = sum(float(torch.linalg.matrix_norm(each, 2)) ** 2 for each in gradient)
    assert spectra[stack.name][0] == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize(
    "metric",
    ["gradient_variance", "whitened_gradient", "activation_spectrum", "stable_rank", "ablation", "output_energy"],
)
def test_every_metric_measures_experts_or_refuses_them(metric: str, make_bench: BaseContext, tmp_path: Path) -> None:
    folder = save_mixture("qwen3-moe", tmp_path / "base")
    context = make_bench(methods="uniform:rank=2", seeds="0", model=str(folder), profile_batches=4)
    if metric in ("ablation", "output_energy"):
        with pytest.raises(Exception, match="not of routed experts"):
            context.profile(metric, seed=0, fold=0, experts=True)
        return
    profile = context.profile(metric, seed=0, fold=0, experts=True)
    plain = context.profile(metric, seed=0, fold=0)
    stacked = {site.name for site in context.architecture.experts}
    assert set(profile.scores) == set(plain.scores) | stacked
    assert {name: profile.scores[name] for name in plain.scores} == pytest.approx(dict(plain.scores), rel=1e-3)
    assert all(profile.scores[name] > 0 for name in stacked)


def test_experts_without_a_calibration_token_are_named(
    make_bench: BaseContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_mixture("mixtral", tmp_path / "base")
    context = make_bench(methods="uniform:rank=2", seeds="0", model=str(folder))
    with torch.no_grad():  # a router that never chooses expert 3
        for name, module in context.base.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda m, i, o: (o[0], o[1], o[2].where(o[2] != 3, 0)))
    profile = context.profile("weight_gradient", seed=0, fold=0, experts=True)
    assert set(profile.unrouted) == {f"{site.name}[3]" for site in context.architecture.experts}
    assert "4 of 16 weights of experts were reached by no calibration token" in caplog.text
    assert "experts.gate_up_proj[3]" in caplog.text
    again = type(profile).from_json(profile.to_json())
    assert (again.unrouted, again.sites) == (profile.unrouted, profile.sites)


def test_costs_budgets_and_labels() -> None:
    base = read_architecture(tiny("mixtral"))
    spec, plain = MethodSpec.parse("uniform:rank=8,experts=true"), MethodSpec.parse("uniform:rank=8")
    assert (spec.label, "experts" in plain.to_dict()) == ("uniform-r8-experts", False)
    assert spec.to_dict()["experts"] is True
    plan = make_plan(spec, base)
    assert isinstance(plan, RankPlan)
    linear = make_plan(plain, base).trainable_parameters
    assert plan.trainable_parameters == linear + sum(4 * site.parameters_per_rank for site in base.experts)
    equal = make_plan(MethodSpec.parse("uniform:experts=true,budget=uniform-8"), base)
    assert isinstance(equal, RankPlan)
    assert 0 <= linear - equal.trainable_parameters < max(site.parameters_per_rank for site in base.experts)
    ranks = {entry.site.experts > 0: entry.rank for entry in equal.entries}
    assert ranks[False] >= 2 * ranks[True] - 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adalora:experts=true", "adalora cannot have experts"),
        ("grow_prune:experts=true", "grow_prune cannot have experts"),
        ("eva:experts=true", "eva cannot have experts"),
        ("uniform:experts=true,dora=true", "no DoRA for routed experts"),
        ("bitfit:experts=true", "takes no experts"),
    ],
)
def test_methods_that_cannot_have_experts_say_so(method: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MethodSpec.parse(method)


def test_what_a_base_cannot_have_is_refused_in_its_plan(make_bench: BaseContext, tmp_path: Path) -> None:
    for name, reason in {"llama4": "PEFT cannot adapt Llama4TextExperts", "jetmoe": "PEFT cannot adapt JetMoe"}.items():
        with pytest.raises(ModelError, match=reason):
            make_plan(MethodSpec.parse("uniform:rank=2,experts=true"), read_architecture(tiny(name)))
    attention = MethodSpec.parse("uniform:rank=2,experts=true,placement=attention")
    with pytest.raises(AllocationError, match="no routed experts are among its sites; leave experts out"):
        make_plan(attention, read_architecture(tiny("mixtral")))
    folder = save_mixture("deepseek-v2", tmp_path / "base")
    with pytest.raises(ConfigError, match=r"target_parameters\), without dropout 0.1"):
        make_bench(methods="uniform:rank=2", seeds="0", model=str(folder), dropout="0.1")
    with pytest.raises(ConfigError, match=r"mlp\.gate_proj, by their weights.*without dora"):
        make_bench(methods="uniform:rank=2,dora=true", seeds="0", model=str(folder))
    make_bench(methods="uniform:rank=2,placement=attention", seeds="0", model=str(folder), dropout="0.1")


def test_the_emitted_configuration_names_parameters(tmp_path: Path) -> None:
    folder = save_mixture("deepseek-v3", tmp_path / "base")
    written = json.loads(emit(folder, "uniform:rank=4,experts=true", "--emit", "peft"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in written["target_parameters"]
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in written["target_parameters"]
    shown = emit(folder, "uniform:rank=4,experts=true")
    assert "stay frozen unless a method has experts=true" in shown
    assert "on all 16 linear layers" in shown


@pytest.mark.parametrize(
    "method", ["adalora:rank=2", "grow_prune:rank=2", "truncate:rank=2", "gora:rank=2", "eva:rank=2"]
)
def test_methods_with_own_training_take_shared_experts(method: str, make_bench: BaseContext, tmp_path: Path) -> None:
    folder = save_mixture("deepseek-v3", tmp_path / "base")
    context = make_bench(methods=method, seeds="0", model=str(folder), max_steps=4, epochs=4)
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    model, _, _ = load_adapter(tmp_path / "adapter")
    probe = load_file(tmp_path / "adapter" / PROBE)["logits"]
    assert torch.equal(probe_logits(context, model, 0), probe)
