"""EVA and GoRA: ranks and initial weights as the papers and PEFT define them, and apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import MethodSpec, ProfileSummary, allocate, uniform_cost
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import AdapterError, AllocationError, ConfigError
from adaptive_lora.methods.adapters import attach, audit_moved
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.eva.fit import EvaSettings, _batches, eva_directions
from adaptive_lora.methods.gora.fit import compressed_gradient, initial_b
from adaptive_lora.methods.importance.passes import joined
from adaptive_lora.models.losses import predict, token_losses
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import TrialOutcome, run_trial
from adaptive_lora.runner.trial_context import TrialOnBase

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)


def run(context: StudyContext, folder: Path) -> list[TrialOutcome]:
    """Run every trial of a workbench's study."""
    return [run_trial(context, trial, folder / trial.label) for trial in context.config.trials()]


def attached(context: StudyContext, trial: TrialSpec) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of every site as training first sees them."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    original = TrialOnBase.train

    def stop(job: TrialOnBase, adapted: Any, *args: Any, **more: Any) -> Any:
        for name, layer in lora_layers(adapted).items():
            seen[name] = tuple(  # type: ignore[assignment]
                part[ADAPTER].weight.detach().clone() for part in (layer.lora_A, layer.lora_B)
            )
        return original(job, adapted, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialOnBase, "train", stop)
        run_trial(context, trial, Path("adapter"))
    return seen


# --- EVA


def test_eva_is_pefts_own(make_bench: BaseContext) -> None:
    """Ranks, A and scale equal what `initialize_lora_eva_weights` makes of the same batches.

    PEFT keeps alpha / rank the same at every site, which is scaling `constant`.
    """
    context = make_bench(methods="eva:rank=3", seeds="0", scaling="constant")
    trial = next(context.config.trials())
    ours = attached(context, trial)
    plan = run_trial(context, trial, Path("again")).plan
    job = TrialOnBase(context, trial, lambda event: None)
    passes = _batches(job, EvaSettings(rank=3, rho=2.0, tau=0.99), causal=True)
    batches = [{**each.inputs, "labels": each.labels} for each in passes]
    assert len(batches) > 1
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=6,
        target_modules=[site.name for site in context.sites],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, tau=0.99),
        fan_in_fan_out=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on memory
        model = get_peft_model(context.base.model, config)
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda m, inputs: m(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]),
        show_progress_bar=False,
    )
    theirs = lora_layers(model)
    assert theirs.keys() == ours.keys() == plan.rank_pattern().keys()
    for entry in plan.entries:
        layer = theirs[entry.site.name]
        assert layer.r[ADAPTER] == entry.rank
        assert layer.scaling[ADAPTER] == pytest.approx(plan.scale_of(entry))
        assert torch.equal(layer.lora_A[ADAPTER].weight, ours[entry.site.name][0])
        assert not ours[entry.site.name][1].any()
    assert sum(plan.rank_pattern().values()) == 3 * len(context.sites)  # the budget is ranks
    assert len(set(plan.rank_pattern().values())) > 1
    assert plan.budget is None
    model.unload()


def test_directions_explain_the_inputs_variance(make_bench: BaseContext) -> None:
    context = make_bench()
    batch = joined(context.calibration(0, 0))[0]
    name = context.sites[0].name
    found = eva_directions(
        context.base.model,
        {name: lambda batch, rows: batch.supervised},
        [batch],
        EvaSettings(rank=4, rho=1.0, tau=0.99),
        lambda model, batch: model(input_ids=batch.input_ids),
    )
    kept: list[torch.Tensor] = []
    module = context.base.model.get_submodule(name)
    hook = module.register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    context.base.model(input_ids=batch.input_ids)
    hook.remove()
    rows = kept[0][batch.labels != -100].double()
    rows = rows - rows.mean(dim=0)
    _, values, vectors = torch.linalg.svd(rows)
    cosines = (found.a[name].double() * vectors[:4]).sum(dim=1).abs()
    assert cosines[0] > 0.98
    share = (values**2 / (values**2).sum())[:4]
    torch.testing.assert_close(torch.tensor(found.explained[name]).double(), share, rtol=0.1, atol=0.01)
    assert not module._forward_hooks


def test_eva_separates_ranks_from_initial_weights(make_bench: BaseContext, tmp_path: Path) -> None:
    methods = "uniform:rank=3 eva:rank=3 eva:rank=3,init=default eva:rank=3,ranks=uniform"
    context = make_bench(methods=methods, seeds="0")
    uniform, whole, ranks_only, init_only = run(context, tmp_path)
    assert ranks_only.plan.rank_pattern() == whole.plan.rank_pattern()
    assert init_only.plan.rank_pattern() == uniform.plan.rank_pattern()
    trials = list(context.config.trials())
    default, own = attached(context, trials[2]), attached(context, trials[3])
    start = attached(context, trials[0])
    for name, (a, _) in default.items():
        shared = min(len(a), len(start[name][0]))
        assert torch.equal(a[:shared], start[name][0][:shared])  # common random numbers
    assert not any(torch.equal(own[name][0], start[name][0]) for name in own)
    assert len({o.train.losses[0] for o in (uniform, whole, ranks_only, init_only)}) == 1  # B is 0
    assert whole.search_seconds > 0


def test_eva_under_a_budget_matches_parameters(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="uniform:rank=3 eva:budget=uniform-3", seeds="0")
    uniform, matched = run(context, tmp_path)
    budget = uniform.plan.trainable_parameters
    least = min(site.parameters_per_rank for site in context.sites)
    dearest = max(site.parameters_per_rank for site in context.sites)
    assert matched.plan.budget == budget
    assert budget - dearest < matched.plan.trainable_parameters <= budget
    assert least < dearest
    assert max(matched.plan.rank_pattern().values()) <= 6  # rho x 3


def test_eva_says_what_it_lacks(make_bench: BaseContext, tmp_path: Path) -> None:
    context = make_bench(methods="eva:rank=9", seeds="0")
    with pytest.raises(AllocationError, match="the narrowest has 32"):
        run(context, tmp_path)
    context = make_bench(methods="eva:rank=4", seeds="0", profile_batches=1, profile_batch_size=1)
    with pytest.raises(AllocationError, match="needs 16 tokens per calibration batch"):
        run(context, tmp_path)
    context = make_bench(methods="eva:rank=2,tau=1", seeds="0", profile_batches=2)
    with pytest.raises(AllocationError, match="have not converged after"):
        run(context, tmp_path)
    model = context.base.model
    assert not any(module._forward_hooks for module in model.modules())
    assert lora_layers(model) == {}
    assert not model.training


# --- GoRA


@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_gora_start_is_the_papers_formula_in_float64(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    width, out, rank, gamma = 40, 24, 5, 0.05
    gradient = torch.randn(out, width, generator=generator)
    a = torch.rand(rank, width, generator=generator) - 0.5
    b = compressed_gradient(gradient, a, gamma=gamma, scale=scale)
    # The paper writes W (m x n) for inputs on the left: A_0 is m x r and B_0 is r x n.
    g, a_0, m = gradient.double().T, a.double().T, width
    alpha = scale * math.sqrt(rank)
    b_0 = -torch.linalg.inv(a_0.T @ a_0) @ a_0.T @ g * gamma * math.sqrt(m) / alpha
    torch.testing.assert_close(b.double(), b_0.T, rtol=1e-5, atol=1e-6)
    # It points against the gradient and has about the norm of a step of SGD at rate gamma.
    step = scale * b @ a
    assert float((step * gradient).sum()) < 0
    ratios = []
    for _ in range(30):
        a = torch.rand(rank, width, generator=generator) - 0.5
        step = scale * compressed_gradient(gradient, a, gamma=gamma, scale=scale) @ a
        ratios.append(float(step.norm() / (gamma * gradient.norm())))
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.1)


def test_gora_starts_from_the_calibration_gradient(make_bench: BaseContext) -> None:
    context = make_bench(methods="gora:rank=2", seeds="0")
    job = TrialOnBase(context, next(context.config.trials()), lambda event: None)
    initial = initial_b(job, job.plan, 0.05)
    batches = context.calibration(0, 0)
    tokens = sum(batch.supervised_tokens for batch in batches)
    for entry in job.plan.entries[::5]:
        module = context.base.model.get_submodule(entry.site.name)
        weight = module.weight.requires_grad_(True)
        found = [predict(context.base.model, batch) for batch in batches]
        loss = sum(token_losses(each.logits, each.targets).sum() for each in found) / tokens
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
        gradient = gradient.T if isinstance(module, Conv1D) else gradient
        wanted = compressed_gradient(gradient, job.initial_a(entry), gamma=0.05, scale=job.plan.scale_of(entry))
        torch.testing.assert_close(initial[entry.site.name], wanted, rtol=1e-3, atol=1e-6)


def test_gora_ranks_are_the_papers(make_bench: BaseContext) -> None:
    context = make_bench()
    sites = context.sites
    scores = {site.name: 1.0 + (index % 5) ** 2 for index, site in enumerate(sites)}
    evidence = ProfileSummary(metric="weight_gradient", scores=scores)
    plan = allocate(MethodSpec.parse("gora:rank=4"), sites, profile=evidence)
    roots = {site.name: math.sqrt(site.in_features + site.out_features) for site in sites}
    total = sum(scores.values())
    for site in sites:
        share = scores[site.name] / total
        wanted = round(sum(roots.values()) * 4 * share / roots[site.name])
        assert plan.rank_pattern()[site.name] == min(max(wanted, 2), 16)
    assert plan.budget is None
    matched = allocate(MethodSpec.parse("gora:budget=uniform-4"), sites, profile=evidence)
    assert 0 <= uniform_cost(sites, 4) - matched.trainable_parameters < 160


def test_gora_separates_ranks_from_initial_weights(make_bench: BaseContext, tmp_path: Path) -> None:
    methods = "uniform:rank=2 gora:rank=2 gora:rank=2,init=default gora:rank=2,ranks=uniform"
    context = make_bench(methods=methods, seeds="0")
    uniform, whole, ranks_only, init_only = run(context, tmp_path)
    assert ranks_only.plan.rank_pattern() == whole.plan.rank_pattern()
    assert init_only.plan.rank_pattern() == uniform.plan.rank_pattern()
    assert ranks_only.train.losses[0] == uniform.train.losses[0]
    assert whole.train.losses[0] != uniform.train.losses[0]
    # The start is a step down: gamma is small, so the loss falls by about gamma·|G|² or less.
    frozen = dict(uniform.train.validation_curve)[0]
    assert dict(init_only.train.validation_curve)[0] < frozen
    assert whole.profile is not None
    assert init_only.profile is None


def test_a_start_other_than_zero_must_be_left(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=2")
    adapted = attach(context.base.model, context.plan(context.config.specs[0], seed=0, fold=0), seed=0, dropout=0.0)
    start = {}
    for name, layer in lora_layers(adapted).items():
        torch.nn.init.ones_(layer.lora_B[ADAPTER].weight)
        start[name] = layer.lora_B[ADAPTER].weight.detach().clone()
    audit_moved(adapted)
    with pytest.raises(AdapterError, match="did not move B at 12 sites"):
        audit_moved(adapted, start)
    adapted.unload()


@pytest.mark.parametrize("name", ["eva", "gora"])
def test_switching_off_both_is_another_method(name: str) -> None:
    with pytest.raises(ConfigError, match="is plain uniform"):
        MethodSpec.parse(f"{name}:ranks=uniform,init=default")
    labels = {MethodSpec.parse(f"{name}:rank=8{more}").label for more in ("", ",init=default", ",ranks=uniform")}
    assert labels == {f"{name}-r8", f"{name}-r8-default_init", f"{name}-r8-uniform_ranks"}
