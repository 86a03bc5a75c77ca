"""AdaLoRA: schedule, budget, exact fold, penalty outside every loss, resumption to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, allocate
from adaptive_lora.allocation.plan import equal_rank, revised
from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.errors import AdapterError, AllocationError
from adaptive_lora.methods.adalora import AdaLora
from adaptive_lora.methods.adalora.fit import (
    AdaLoraCallback,
    attach_adalora,
    audit_adalora,
    fold,
    scale_of,
    training_parameters,
)
from adaptive_lora.methods.adapters import attach, audit_as_built
from adaptive_lora.methods.adapters.attach import ADAPTER, lora_layers
from adaptive_lora.methods.adapters.factors import write_factors
from adaptive_lora.methods.ranks_in_training import Phases
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.runner.trial_log import trial_metrics
from adaptive_lora.training import Trainer, TrainInputs

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)


@given(st.integers(2, 2000), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(1, 300))
def test_phases_leave_room_to_cut(steps: int, warm: float, final: float, interval: int) -> None:
    phases = Phases.of(steps, warmup_share=warm, final_share=final, interval=interval)
    assert 0 <= phases.warmup < phases.settle <= steps
    assert phases.due(phases.settle)
    assert not any(phases.due(step) for step in range(1, phases.warmup + 1))
    assert not any(phases.due(step) for step in range(phases.settle + 1, steps + 1))


def test_one_step_is_too_few() -> None:
    with pytest.raises(AllocationError, match="at least 2 optimiser steps"):
        AdaLora().phases(1)


def adalora_on(context: StudyContext, start_rank: int = 4) -> tuple[PeftModel, AdaLoraCallback]:
    """Attach AdaLoRA layers and the regime that ends at uniform rank 2's parameters."""
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    start = equal_rank(plan, start_rank)
    options = AdaLora(warmup_share=0.2, final_share=0.3)
    adapted = attach_adalora(context.base.model, start, options, seed=0, dropout=context.config.train.dropout)
    assert plan.budget is not None
    return adapted, AdaLoraCallback(adapted, start, options, plan.budget)


def trainer(context: StudyContext, adapted: PeftModel, callback: AdaLoraCallback, **more: Any) -> Any:
    """Train an adapted model as a trial would."""
    parts = context.splits(0)
    inputs = TrainInputs(
        examples=parts.train,
        collate=context.task.collate,
        validate=lambda model: context.losses(model, parts.validation).loss,
        callback=callback,
        **more,
    )
    return Trainer(adapted, inputs, context.config.train, context.runtime, lr=1e-2, seed=0).run()


@pytest.fixture
def adalora_bench(make_bench: BaseContext) -> StudyContext:
    """Ten steps of AdaLoRA with dropout of both kinds."""
    return make_bench(methods="adalora:rank=2", max_steps=10, epochs=9, dropout=0.1, validations=2, seeds="0")


def test_start_is_the_bases_function_from_the_seeds_own_streams(adalora_bench: StudyContext) -> None:
    before = adalora_bench.base.model(IDS).logits
    adapted, _ = adalora_on(adalora_bench)
    assert torch.equal(adapted.eval()(IDS).logits, before)
    small = {name: layer.lora_A[ADAPTER][:3] for name, layer in lora_layers(adapted).items()}
    adapted.unload()
    again, _ = adalora_on(adalora_bench, start_rank=3)
    assert all(torch.equal(layer.lora_A[ADAPTER], small[name]) for name, layer in lora_layers(again).items())


def test_trial_ends_as_plain_lora_within_the_budget(
    adalora_bench: StudyContext, tmp_path: Path, base_folder: Path
) -> None:
    context, trial = adalora_bench, next(adalora_bench.config.trials())
    outcome = run_trial(context, trial, tmp_path / "adapter")
    plan, start = outcome.plan, equal_rank(context.plan(trial.method, seed=0, fold=0), 3)
    assert plan.budget is not None
    dearest = max(site.parameters_per_rank for site in context.sites)
    assert plan.budget - dearest < plan.trainable_parameters <= plan.budget
    assert outcome.training_parameters == training_parameters(start)
    totals = [sum(event.ranks.values()) for event in outcome.history]
    assert [event.step for event in outcome.history] == [0, 2, 3, 4, 5, 6]
    assert totals[0] == 3 * len(context.sites)
    assert totals[-1] == sum(plan.rank_pattern().values())
    metrics = trial_metrics(context, outcome, 0)
    assert metrics["training_parameters"] > metrics["trainable_parameters"]
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    audit_as_built(loaded, plan)
    again = context.losses(loaded.eval(), context.splits(0).test)
    assert again.nll_E.tolist() == outcome.test.nll_E.tolist()
    assert lora_layers(context.base.model) == {}


@pytest.mark.parametrize("policy", ["standard", "rslora", "constant"])
def test_fold_gives_the_same_logits_with_sites_of_rank_0(make_bench: BaseContext, policy: str) -> None:
    context = make_bench(methods="adalora:rank=2", max_steps=10, epochs=9, scaling=policy)
    adapted, callback = adalora_on(context)
    trainer(context, adapted, callback)
    gone = context.sites[3].name
    callback.kept[gone] = [False] * 4
    with torch.no_grad():
        lora_layers(adapted)[gone].lora_E[ADAPTER].zero_()
    logits = adapted.eval()(IDS).logits
    plan = revised(equal_rank(context.plan(context.config.specs[0], seed=0, fold=0), 4), callback.ranks())
    factors = fold(adapted, callback.kept, plan)
    adapted.unload()
    plain = attach(context.base.model, plan, seed=0, dropout=0.0).eval()
    write_factors(plain, factors)
    audit_as_built(plain, plan)
    assert gone in plan.left_out
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    plain.unload()
    assert not torch.allclose(logits, context.base.model(IDS).logits, atol=1e-3)


def test_penalty_is_pefts_and_stays_out_of_the_losses(adalora_bench: StudyContext, tmp_path: Path) -> None:
    adapted, callback = adalora_on(adalora_bench)
    adapted.eval()
    with_penalty = adapted(input_ids=IDS, labels=IDS).loss
    without = adapted.base_model.model(input_ids=IDS, labels=IDS).loss
    penalty = callback.penalty()
    assert penalty is not None
    torch.testing.assert_close(with_penalty - without, penalty, rtol=1e-4, atol=1e-5)
    adapted.unload()
    losses = []
    for weight in (0, 0.5):
        context = adalora_bench
        spec = f"adalora:rank=2,orthogonality={weight}"
        trial = next(type(context.config)(**{
            **{f: getattr(context.config, f) for f in ("model", "data", "train", "evaluation",
               "profile", "tracking", "seeds", "lr")}, "methods": (spec,),
        }).trials())  # fmt: skip
        losses.append(run_trial(context, trial, tmp_path / str(weight)).train.losses)
    assert losses[0][0] == losses[1][0]  # step 1 starts from the base either way
    assert losses[0][1:] != losses[1][1:]  # and learns otherwise


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_built_is_audited(make_bench: BaseContext, precision: str) -> None:
    """On a bf16 base PEFT would also train `ranknum`, the rank in the scale."""
    context = make_bench(methods="adalora:rank=2", max_steps=10, precision=precision)
    adapted, _ = adalora_on(context)
    start = equal_rank(context.plan(context.config.specs[0], seed=0, fold=0), 4)
    audit_adalora(adapted, start)
    for layer in lora_layers(adapted).values():
        assert scale_of(layer) == pytest.approx(context.config.train.alpha / 4, rel=1e-5)
    layer.ranknum[ADAPTER].requires_grad_(True)
    with pytest.raises(AdapterError, match="parameters trainable, planned"):
        audit_adalora(adapted, start)
    layer.ranknum[ADAPTER].requires_grad_(False).fill_(8.0)
    with pytest.raises(AdapterError, match=r"scale is 3\.99.*, planned 8\.0"):
        audit_adalora(adapted, start)


@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.long), 4, pytest.param(7, marks=pytest.mark.long), 9]
)
def test_interrupted_and_resumed_is_the_uninterrupted_run(adalora_bench: StudyContext, stop: int) -> None:
    """Before the first cut, between cuts, at the last cut and after it."""
    context = adalora_bench
    kept: dict[str, Any] = {}

    def keep(step: int, take: Callable[[], Any]) -> None:
        if step == stop:
            kept["snapshot"] = take()
            raise KeyboardInterrupt

    def weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}

    adapted, callback = adalora_on(context)
    whole = trainer(context, adapted, callback)
    expected = weights(adapted)
    adapted.unload()
    adapted, interrupted = adalora_on(context)
    with pytest.raises(KeyboardInterrupt):
        trainer(context, adapted, interrupted, on_snapshot=keep)
    adapted.unload()
    adapted, resumed = adalora_on(context)
    result = trainer(context, adapted, resumed, resume=kept["snapshot"])
    assert result.losses == whole.losses
    assert result.validation_curve == whole.validation_curve
    assert result.order_digest == whole.order_digest
    assert resumed.history == callback.history
    assert resumed.kept == callback.kept
    found = weights(adapted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    adapted.unload()


def test_skipped_steps_do_not_lose_the_last_cut(adalora_bench: StudyContext, tmp_path: Path) -> None:
    """The step of the last cut itself is not finite; PEFT alone would crash at the next."""
    context = adalora_bench
    settle = AdaLora().phases(10).settle
    calls = {"count": 0}

    def poison(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not context.base.model.training:
            return None
        calls["count"] += 1
        return output * float("nan") if calls["count"] == settle else None

    hook = context.base.model.transformer.ln_f.register_forward_hook(poison)
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    hook.remove()
    assert outcome.train.skipped_steps == 1
    assert outcome.history[-1].step == settle
    assert outcome.plan.trainable_parameters <= (outcome.plan.budget or 0)


def test_schedule_counts_optimiser_steps(make_bench: BaseContext, tmp_path: Path) -> None:
    """With accumulation a step is several batches; what counts is the step."""
    context = make_bench(methods="adalora:rank=2", max_steps=10, accumulation=2, epochs=9, seeds="0")
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert [event.step for event in outcome.history] == [0, 2, 3, 4, 5, 6]
    assert len(outcome.train.losses) == 10


def test_start_must_be_above_the_budget(make_bench: BaseContext) -> None:
    """Seen before any training; PEFT alone fails in it (`kthvalue(): selected number k ...`)."""
    with pytest.raises(AllocationError, match="nothing would be cut"):
        make_bench(methods="adalora:rank=3,start_rank=3")


def test_start_is_one_rank_everywhere() -> None:
    sites = [
        AdapterSite(name=f"h.0.{n}", layer=0, role=Role.UP, in_features=width, out_features=64)
        for n, width in enumerate((8, 64, 64))
    ]
    with pytest.raises(AllocationError, match="rank 9 does not fit every site"):
        allocate(MethodSpec.parse("adalora:rank=6"), sites)
    assert allocate(MethodSpec.parse("adalora:rank=5"), sites).budget
