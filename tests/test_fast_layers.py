"""Fused LoRA steps and activations give what PEFT and transformers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_packing import adapted, build, gradients

from adaptive_lora.models.kernels import fast_layers

IDS = torch.arange(3, 19)[None]


def fused(model: Any) -> list[str]:
    """Return the modules that have another forward step now."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama", "opt"])
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    model = adapted(name)
    plain = model(input_ids=IDS).logits
    wanted = gradients(model, plain.square().sum())
    with fast_layers(model):
        assert len(fused(model)) >= 8
        logits = model(input_ids=IDS).logits
        found = gradients(model, logits.square().sum())
    assert fused(model) == []
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_in_float32_they_are_as_near_to_float64_as_peft_is() -> None:
    exact, model = adapted("gpt2"), adapted("gpt2").float()
    wanted = gradients(exact, exact(input_ids=IDS).logits.square().sum())
    plain = gradients(model, model(input_ids=IDS).logits.square().sum())
    with fast_layers(model):
        found = gradients(model, model(input_ids=IDS).logits.square().sum())
    assert (found - wanted).norm() < 1.5 * (plain - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_on_many_tokens_merges_as_near_to_float64(name: str) -> None:
    exact, model = adapted(name), adapted(name).float()
    ids = torch.arange(3, 19).repeat(1, 16)[:, :250].expand(4, -1)
    wanted = gradients(exact, exact(input_ids=ids).logits.square().sum())
    plain = gradients(model, model(input_ids=ids).logits.square().sum())
    with fast_layers(model), _CountsProducts() as counted:
        loss = model(input_ids=ids).logits.square().sum()
        forward = counted.merged
        found = gradients(model, loss)
    assert 0 < forward < counted.merged
    assert (found - wanted).norm() < 1.5 * (plain - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_gradients_weights_are_merged_as_near_to_float64(name: str) -> None:
    """The threshold is met by this many tokens; a few tokens keep the usual step."""
    exact, model = adapted(name), adapted(name).float()
    ids = torch.arange(3, 19).repeat(1, 16)[:, :250].expand(4, -1)
    with torch.no_grad():
        wanted, plain = exact(input_ids=ids).logits, model(input_ids=ids).logits
        with fast_layers(model), _CountsProducts() as counted:
            found = model(input_ids=ids).logits
        assert not torch.equal(found, plain)  # another order of sums
        assert counted.merged > 0
        with fast_layers(model), _CountsProducts() as counted:
            model(input_ids=ids[:1, :4])
        assert counted.merged == 0
    assert (found - wanted).norm() < 1.5 * (plain - wanted).norm() + 1e-7 * wanted.norm()


class _CountsProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products that are added to a matrix: weights that are merged."""

    merged = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.merged += func is torch.ops.aten.addmm.default and args[0].ndim == 2
        return func(*args, **(kwargs or {}))


def test_under_autocast_they_compute_in_its_type() -> None:
    model = adapted("llama").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=IDS).logits.float()
        with fast_layers(model):
            logits = model(input_ids=IDS).logits.float()
    error = (logits - plain).abs().max() / plain.abs().max()
    assert 0 < error < 0.05


def test_ranks_that_change_in_training_are_followed() -> None:
    model = adapted("llama")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with fast_layers(model):
        before = model(input_ids=IDS).logits
        layer.lora_B["default"].weight = torch.nn.Parameter(torch.zeros_like(layer.lora_B["default"].weight))
        layer.scaling["default"] = 7.0
        after = model(input_ids=IDS).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(input_ids=IDS).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_other_layers_keep_pefts_step(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], **settings)
    model = get_peft_model(build("opt"), config)
    with fast_layers(model):
        assert fused(model) == []


def test_disabled_and_merged_adapters_are_heeded() -> None:
    model = adapted("llama")
    plain = model(input_ids=IDS).logits
    with fast_layers(model):
        with model.disable_adapter():
            bare = model(input_ids=IDS).logits
        model.merge_adapter()
        merged = model(input_ids=IDS).logits
        model.unmerge_adapter()
    torch.testing.assert_close(merged, plain, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(bare, model(input_ids=IDS).logits)
