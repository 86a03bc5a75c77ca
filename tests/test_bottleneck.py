"""Bottleneck adapters against the published formula, computed independently."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from allocation_cases import gpt2_sites
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from adaptive_lora.allocation import MethodSpec, TunerPlan, make_plan
from adaptive_lora.allocation.architecture import Architecture
from adaptive_lora.allocation.site import Role
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.tuners import attach_custom_tuner
from adaptive_lora.models.sites import read_architecture
from adaptive_lora.serving.custom_tuner import AdaptedModel

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
ERF = np.vectorize(math.erf)
FORMULAS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.fixture
def model() -> Any:
    """A GPT-2 of two layers with random weights, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return GPT2LMHeadModel(config).requires_grad_(False).eval()


def planned(model: Any, method: str) -> TunerPlan:
    """Return a method's plan on a model."""
    plan = make_plan(MethodSpec.parse(method), read_architecture(model))
    assert isinstance(plan, TunerPlan)
    return plan


def drawn(adapted: AdaptedModel) -> None:
    """Give every trained tensor random values: at the start W_up is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapted.trained_state().values():
            tensor.normal_(0, 0.5, generator=generator)


@pytest.mark.parametrize("nonlinearity", FORMULAS)
def test_it_computes_the_published_formula(model: Any, nonlinearity: str) -> None:
    """H + f(h·W_down + b_down)·W_up + b_up, with h the projection's own output."""
    plan = planned(model, f"houlsby:width=3,nonlinearity={nonlinearity},norms=false")
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    adapted = attach_custom_tuner(model, plan, seed=0)
    drawn(adapted)
    places = list(plan.settings["bottlenecks"])
    for name in places:  # a hook that comes later sees what the adapter made of the output

        def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
            seen[name] = (args[0].double(), output.double())

        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        adapted(IDS)
    assert len(seen) == 4
    for name, (inputs, output) in seen.items():
        module = model.get_submodule(name)
        own = {key: value.double().numpy() for key, value in module.state_dict().items()}
        h = inputs.numpy() @ own["weight"] + own["bias"]  # Conv1D keeps weights as (in, out)
        inner = FORMULAS[nonlinearity](h @ own["bottleneck.down.weight"].T + own["bottleneck.down.bias"])
        expected = h + inner @ own["bottleneck.up.weight"].T + own["bottleneck.up.bias"]
        np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_it_stands_inside_the_skip_connection(model: Any) -> None:
    """What the last adapter adds to its projection is what the last block's output gains."""
    with torch.no_grad():
        before = model.transformer(IDS, output_hidden_states=True)
        place = "transformer.h.1.mlp.c_proj"
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(place).register_forward_hook(lambda module, args, output: outputs.append(output))
        blocks: list[torch.Tensor] = []
        model.transformer.h[1].register_forward_hook(
            lambda module, args, output: blocks.append(output[0] if isinstance(output, tuple) else output)
        )
        model.transformer(IDS)
        handle.remove()
        adapted = AdaptedModel(model, bottlenecks={place: 4}, nonlinearity="relu")
        drawn(adapted)
        adapter = model.get_submodule(place).bottleneck
        gained = adapter(outputs[0]) - outputs[0]
        adapted(IDS)
        torch.testing.assert_close(blocks[1], blocks[0] + gained)
        adapted.release()
        after = model.transformer(IDS)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)


def test_parameters_by_hand(model: Any) -> None:
    """D = 16, two layers: a width of w costs w(2d + 1) + d a place; five layer norms cost 2d."""
    assert planned(model, "pfeiffer:width=3").trainable_parameters == 2 * (3 * 33 + 16)
    houlsby = 4 * (3 * 33 + 16)
    assert planned(model, "houlsby:width=3,norms=false").trainable_parameters == houlsby
    assert planned(model, "houlsby:width=3").trainable_parameters == houlsby + 5 * 32
    assert planned(model, "pfeiffer:reduction=4").settings["bottlenecks"] == dict.fromkeys(
        ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"), 4
    )
    assert planned(model, "pfeiffer:reduction=4").method == "pfeiffer-red4"
    assert planned(model, "houlsby:width=8").method == "houlsby-w8"


def test_a_smaller_width_starts_with_the_first_rows_of_a_larger(model: Any) -> None:
    starts = []
    for width in (2, 5):
        adapted = attach_custom_tuner(model, planned(model, f"pfeiffer:width={width}"), seed=3)
        starts.append({n: t.clone() for n, t in adapted.trained_state().items()})
        adapted.release()
    for name, small in starts[0].items():
        if ".down." in name:
            assert torch.equal(small, starts[1][name][:2])
            assert float(small.abs().max()) <= 1 / 4  # 1 / sqrt(16)
        else:
            assert not small.any()


BASE = Architecture(kind="GPT2LMHeadModel", sites=gpt2_sites(3, 48))


@given(budget=st.integers(1_000, 400_000), method=st.sampled_from(["houlsby", "pfeiffer"]))
def test_the_width_is_the_largest_within_the_budget(budget: int, method: str) -> None:
    plan = make_plan(MethodSpec.parse(f"{method}:budget={budget}"), BASE)
    assert isinstance(plan, TunerPlan)
    (width,) = set(plan.settings["bottlenecks"].values())
    wider = make_plan(MethodSpec.parse(f"{method}:width={width + 1}"), BASE)
    assert plan.trainable_parameters <= budget < wider.trainable_parameters


def test_what_cannot_be_planned() -> None:
    with pytest.raises(AllocationError, match="one unit of 6 bottlenecks already costs"):
        make_plan(MethodSpec.parse("houlsby:budget=100"), BASE)
    with pytest.raises(AllocationError, match=r"houlsby-w9@100 trains [\d,]+ parameters, above"):
        make_plan(MethodSpec.parse("houlsby:width=9,budget=100"), BASE)
    bare = Architecture(kind="Bare", sites=tuple(s for s in BASE.sites if s.role is Role.QKV))
    with pytest.raises(AllocationError, match="Bare has no linear layer of role down, output"):
        make_plan(MethodSpec.parse("houlsby"), bare)
