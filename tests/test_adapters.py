"""Adapters: the plan is what was built; common random numbers; stock PEFT reads what is saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, Scaling
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adapters import attach, audit_as_built, audit_moved, detach
from adaptive_lora.methods.adapters.attach import ADAPTER, initial_a, lora_layers
from adaptive_lora.methods.adapters.dropout import SiteDropout, set_dropout_step
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial

BaseContext = Callable[..., StudyContext]
IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    "method",
    [
        "uniform:rank=3",
        "linear_decay:rank=5,low_rank=1",
        "attention_heavy:rank=4",
        "three_band:rank=4",
        "empirical:rank=3",
        "uniform:placement=attention",
        "uniform:rank=4,target_names=c_proj",
    ],
)
def test_every_method_is_built_as_planned(make_bench: BaseContext, method: str) -> None:
    context = make_bench(methods=method)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    before = context.base.model(IDS).logits
    adapted = attach(context.base.model, plan, seed=0, dropout=0.1).eval()
    audit_as_built(adapted, plan)
    assert torch.equal(adapted(IDS).logits, before)  # B is zero
    with pytest.raises(AdapterError, match="did not move B at"):
        audit_moved(adapted)
    detach(adapted)
    assert lora_layers(context.base.model) == {}
    assert torch.equal(context.base.model(IDS).logits, before)


@pytest.mark.parametrize(
    ("policy", "scale_of"),
    [("constant", lambda rank: 32 / 16), ("rslora", lambda rank: 32 / rank**0.5), ("standard", lambda rank: 32 / rank)],
)
def test_scale_policies_are_built(
    make_bench: BaseContext, tmp_path: Path, policy: str, scale_of: Callable[[int], float]
) -> None:
    context = make_bench(methods="linear_decay:rank=5,low_rank=1", scaling=policy)
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    audit_as_built(adapted, plan)
    for entry in plan.entries:
        layer = lora_layers(adapted)[entry.site.name]
        assert layer.scaling[ADAPTER] == pytest.approx(scale_of(entry.rank))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    detach(adapted)
    loaded = PeftModel.from_pretrained(context.base.model, tmp_path / "adapter", is_trainable=True)
    audit_as_built(loaded, plan)


def test_audit_sees_another_scaling(make_bench: BaseContext) -> None:
    context = make_bench(methods="uniform:rank=4")
    plan = context.plan(context.config.specs[0], seed=0, fold=0)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    other = dataclasses.replace(plan, scaling=Scaling.RSLORA)
    with pytest.raises(AdapterError, match=r"scale is 8\.0, planned 16\.0"):
        audit_as_built(adapted, other)


def test_audit_sees_every_kind_of_difference(make_bench: BaseContext) -> None:
    context = make_bench()
    plan, other = (context.plan(spec, seed=0, fold=0) for spec in context.config.specs)
    adapted = attach(context.base.model, plan, seed=0, dropout=0.0)
    layer = next(iter(lora_layers(adapted).values()))
    with pytest.raises(AdapterError, match=r"rank is 2, planned 3"):
        audit_as_built(adapted, other)
    layer.scaling[ADAPTER] = 1.5
    with pytest.raises(AdapterError, match=r"scale is 1\.5, planned 16\.0"):
        audit_as_built(adapted, plan)
    layer.scaling[ADAPTER] = 16.0
    context.base.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="is trainable"):
        audit_as_built(adapted, plan)


def test_peft_alone_would_let_a_short_name_win(make_bench: BaseContext) -> None:
    """The trap that full names avoid: `c_proj` stands in attention and in the feed-forward part."""
    context = make_bench()
    plan = context.plan(MethodSpec.parse("attention_heavy:rank=6"), seed=0, fold=0)
    built = lora_layers(attach(context.base.model, plan, seed=0, dropout=0.0))
    assert built["transformer.h.0.attn.c_proj"].r[ADAPTER] == 6
    assert built["transformer.h.0.mlp.c_proj"].r[ADAPTER] == 3


def test_initial_a_is_nested_and_keyed_by_site() -> None:
    small, large = (initial_a(3, "h.0.attn", rank, 33) for rank in (5, 9))
    assert torch.equal(small, large[:5])
    assert not torch.equal(small, initial_a(3, "h.1.attn", 5, 33))
    assert not torch.equal(small, initial_a(4, "h.0.attn", 5, 33))
    wide = initial_a(0, "s", 64, 400)
    assert float(wide.abs().max()) <= 1 / 400**0.5
    assert float(wide.std()) == pytest.approx(1 / (3 * 400) ** 0.5, rel=0.02)


def test_dropout_masks_depend_on_seed_site_and_step_alone() -> None:
    ones = torch.ones(4, 50)

    def mask(step: int = 0, seed: int = 1, site: str = "a") -> torch.Tensor:
        dropout = SiteDropout(0.3, seed=seed, site=site)
        set_dropout_step(dropout, step)
        torch.rand(7)  # the global stream does not matter
        return dropout(ones)

    assert torch.equal(mask(), mask())
    assert not any(torch.equal(mask(), m) for m in (mask(step=1), mask(seed=2), mask(site="b")))
    assert float(torch.stack([mask(step=s) for s in range(200)]).mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(SiteDropout(0.3, seed=1, site="a").eval()(ones), ones)


def test_saved_adapter_is_stock_peft(make_bench: BaseContext, tmp_path: Path, base_folder: Path) -> None:
    context = make_bench(methods="linear_decay:rank=5,low_rank=1")
    trial = next(context.config.trials())
    seen = {}

    def keep(event: object) -> None:
        seen["last"] = event

    outcome = run_trial(context, trial, tmp_path / "adapter", keep)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    audit = {name: layer.r[ADAPTER] for name, layer in lora_layers(loaded).items()}
    assert audit == outcome.plan.rank_pattern()
    again = context.losses(loaded, context.splits(0).test)
    assert again.nll_E.tolist() == outcome.test.nll_E.tolist()
    record = json.loads((tmp_path / "adapter" / "adaptive_lora.json").read_text())
    assert record["base"]["content_hash"] == context.base.reference.content_hash
    assert not list((tmp_path / "adapter").glob("*.bin"))
