"""Families on every supported architecture: built as planned, and taken off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES

from adaptive_lora.allocation import MethodSpec, TunerPlan, make_plan
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.audit import audit_tuner
from adaptive_lora.methods.adapters.tuners import attach_custom_tuner, attach_peft_tuner, detach_peft_tuner
from adaptive_lora.methods.bottleneck import _Bottleneck
from adaptive_lora.methods.selected import _Selected
from adaptive_lora.models.classes import auto_class
from adaptive_lora.models.sites import read_architecture
from adaptive_lora.serving.custom_tuner import AdaptedModel

CAUSAL = tuple(
    name
    for name, (kind, settings, towers) in ARCHITECTURES.items()
    if auto_class(getattr(transformers, kind)(**settings)) is transformers.AutoModelForCausalLM and len(towers) == 1
)
NO_PREFIX = {"qwen3.5", "gemma3n", "gemma4", "granite4", "lfm2", "falcon-h1"}
BY_TOKEN = {"gemma3n", "gemma4"}
METHODS = ("prompt_tuning:tokens=2", "prefix_tuning:tokens=2", "p_tuning:tokens=2,encoder_width=3",
           "ia3", "houlsby:width=2", "pfeiffer:width=2", "full", "bitfit", "ln_tuning",
           "head_only")  # fmt: skip
IDS = torch.tensor([[1, 5, 7, 9, 11, 3]])


def tiny(name: str) -> Any:
    """Build a small model of random weights."""
    kind, settings, _ = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    return model.requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    """Return logits without a cache."""
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return found


def refusal(method: str, base: Architecture) -> str:
    """Return the words by which a method refuses a base; empty if it takes it."""
    sizes = base.decoder
    assert sizes is not None
    prompts = "by token id, which virtual tokens have not" if sizes.no_embeddings else ""
    return {
        "bitfit": "" if base.biases else "has no bias terms",
        "ln_tuning": "" if base.norm_tensors else "has no normalisation layer with weights",
        "prefix_tuning": sizes.no_prefix or "",
        "prompt_tuning": prompts,
        "p_tuning": prompts,
    }.get(method.partition(":")[0], "")


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_is_built_as_planned(name: str) -> None:
    model = tiny(name)
    base = read_architecture(model)
    assert base.decoder is not None
    assert (base.decoder.no_prefix is not None) == (name in NO_PREFIX)
    assert (base.decoder.no_embeddings is not None) == (name in BY_TOKEN)
    before = logits(model)
    for method in METHODS:
        spec = MethodSpec.parse(method)
        if reason := refusal(method, base):
            with pytest.raises(AllocationError, match=reason):
                make_plan(spec, base)
            continue
        plan = make_plan(spec, base)
        assert isinstance(plan, TunerPlan)
        ours = isinstance(spec.options, _Bottleneck | _Selected)
        adapted: Any = (attach_custom_tuner if ours else attach_peft_tuner)(model, plan, seed=0)
        audit_tuner(adapted, plan.tensors)
        found = logits(adapted.eval())
        if not plan.positions:
            torch.testing.assert_close(found, before, rtol=0, atol=0)
        found.square().mean().backward()
        moved = [p.grad is not None for p in adapted.parameters() if p.requires_grad]
        assert all(moved), method
        AdaptedModel.release(adapted) if ours else detach_peft_tuner(adapted)
        assert torch.equal(logits(model), before)
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "distilbert", "vit"])
def test_families_without_prompts_serve_encoders(name: str) -> None:
    kind, settings, _ = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**settings))
    model.requires_grad_(False).eval()
    inputs = torch.ones(1, 3, 32, 32) if name == "vit" else IDS
    before, base = model(inputs).last_hidden_state, read_architecture(model)
    for method in ("ia3", "houlsby:width=2", "pfeiffer:width=2", "full", "bitfit", "ln_tuning"):
        spec = MethodSpec.parse(method)
        plan = make_plan(spec, base)
        assert isinstance(plan, TunerPlan)
        ours = isinstance(spec.options, _Bottleneck | _Selected)
        adapted: Any = (attach_custom_tuner if ours else attach_peft_tuner)(model, plan, seed=0)
        audit_tuner(adapted, plan.tensors)
        assert torch.equal(adapted(inputs).last_hidden_state, before)
        AdaptedModel.release(adapted) if ours else detach_peft_tuner(adapted)
        assert torch.equal(model(inputs).last_hidden_state, before)


@pytest.mark.parametrize("name", ["t5-gated", "clip", "llava", "smolvlm", "qwen2-vl", "whisper"])
def test_families_without_prompts_fit_models_of_two_towers(name: str) -> None:
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    model: Any = auto_class(config).from_config(config).requires_grad_(False).eval()
    base = read_architecture(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for method in ("ia3", "houlsby:width=2", "pfeiffer:width=2", "full", "ln_tuning"):
        spec = MethodSpec.parse(method)
        plan = make_plan(spec, base)
        assert isinstance(plan, TunerPlan)
        ours = isinstance(spec.options, _Bottleneck | _Selected)
        adapted: Any = (attach_custom_tuner if ours else attach_peft_tuner)(model, plan, seed=0)
        audit_tuner(adapted, plan.tensors)
        AdaptedModel.release(adapted) if ours else detach_peft_tuner(adapted)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "clip"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_virtual_tokens_need_a_causal_model(name: str, method: str) -> None:
    kind, settings, _ = ARCHITECTURES[name]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**settings))
    with pytest.raises(AllocationError, match="takes no virtual tokens"):
        make_plan(MethodSpec.parse(method), read_architecture(model))
