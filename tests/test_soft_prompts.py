"""Prefixes and virtual tokens: their size, their place, and PEFT's own configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec, TunerPlan, make_plan
from adaptive_lora.allocation.architecture import Architecture, Decoder
from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import AllocationError, ConfigError
from adaptive_lora.methods.adapters.audit import audit_tuner
from adaptive_lora.methods.adapters.tuners import attach_peft_tuner, detach_peft_tuner
from adaptive_lora.models.base import skeleton
from adaptive_lora.models.sites import read_architecture
from adaptive_lora.runner.context import StudyContext

BaseContext = Callable[..., StudyContext]
SIZES = Decoder(width=32, layers=3, kv_heads=2, head_dim=8, max_positions=None)
BASE = Architecture(kind="Any", sites=(), decoder=SIZES)


def planned(method: str, base: Architecture = BASE) -> TunerPlan:
    """Return a method's plan."""
    plan = make_plan(MethodSpec.parse(method), base)
    assert isinstance(plan, TunerPlan)
    return plan


def test_parameters_by_hand() -> None:
    assert planned("prompt_tuning").trainable_parameters == 20 * 32
    assert planned("prefix_tuning:tokens=5").trainable_parameters == 5 * 3 * 2 * 16
    encoder = 20 * 32 + (32 * 7 + 7) + (7 * 7 + 7) + (7 * 32 + 32)
    assert planned("p_tuning:encoder_width=7").trainable_parameters == encoder
    assert planned("p_tuning").settings["encoder_width"] == 32


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("prompt_tuning", "prompt_tuning-n20"),
        ("prompt_tuning:budget=uniform-8", "prompt_tuning@uniform-8"),
        ("prefix_tuning:tokens=5,budget=9999", "prefix_tuning-n5@9999"),
        ("p_tuning:encoder_width=7", "p_tuning-n20-w7"),
    ],
)
def test_labels(method: str, label: str) -> None:
    assert MethodSpec.parse(method).label == label


@given(
    budget=st.integers(2_000, 10**6),
    size_parameter=st.sampled_from(["prompt_tuning:tokens", "prefix_tuning:tokens", "p_tuning:encoder_width"]),
)
def test_the_knob_is_the_largest_within_the_budget(budget: int, size_parameter: str) -> None:
    name, option = size_parameter.split(":")
    plan = planned(f"{name}:budget={budget}")
    more = planned(f"{name}:{option}={plan.settings[option] + 1}")
    assert plan.trainable_parameters <= budget < more.trainable_parameters


def test_a_budget_for_less_than_one_token() -> None:
    with pytest.raises(AllocationError, match="one virtual token already costs 96"):
        planned("prefix_tuning:budget=95")
    with pytest.raises(AllocationError, match="one unit of the encoder of 20 tokens"):
        planned("p_tuning:budget=100")


def test_a_budget_takes_at_most_half_of_the_positions() -> None:
    short = Architecture(kind="Any", sites=(), decoder=dataclasses.replace(SIZES, max_positions=64))
    plan = planned("prompt_tuning:budget=100000", short)
    assert plan.settings["tokens"] == 32
    assert "of 100,000 parameters 1,024 are used, the nearest below" in plan.notes[0]
    assert not planned("prefix_tuning:budget=3072", short).notes  # 32 tokens exactly


def test_virtual_tokens_take_positions(make_bench: BaseContext) -> None:
    context = make_bench()
    longest = max(e.length for part in ("train", "validation", "test")
                  for e in getattr(context.splits(0), part))  # fmt: skip
    room = 128 - longest
    make_bench(methods=f"prompt_tuning:tokens={room}")
    words = f"virtual tokens and the longest example .* set max_tokens to {127 - room}"
    with pytest.raises(ConfigError, match=words):
        make_bench(methods=f"prompt_tuning:tokens={room + 1}")
    with pytest.raises(AllocationError, match="128 virtual tokens leave no room"):
        make_bench(methods="prefix_tuning:tokens=128")


def test_a_prefix_and_gradient_checkpointing_exclude_each_other(make_bench: BaseContext) -> None:
    with pytest.raises(ConfigError, match="keeps its prefix in the cache, which gradient"):
        make_bench(methods="prefix_tuning", gradient_checkpointing="true")


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
def test_fewer_tokens_are_the_first_of_more(base: str, request: pytest.FixtureRequest) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base))
    model.requires_grad_(False)
    words = model.get_input_embeddings().weight
    for family in ("prompt_tuning", "prefix_tuning"):
        starts = []
        for tokens in (3, 5):
            plan = planned(f"{family}:tokens={tokens}", read_architecture(model))
            adapted = attach_peft_tuner(model, plan, seed=0)
            starts.append(adapted.prompt_encoder["default"].embedding.weight.detach().clone())
            detach_peft_tuner(adapted)
        assert torch.equal(starts[0], starts[1][:3])
        if family == "prompt_tuning":  # they are embeddings of words
            assert all(any(torch.equal(row, word) for word in words) for row in starts[0])


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning:tokens=4", "p_tuning", "ia3"])
def test_stock_peft_builds_the_emitted_configuration(
    method: str, base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(base))
    words = ["plan", "--model", folder, "--method", method, "--emit", "peft"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0
    (tmp_path / "adapter_config.json").write_text(result.stdout)
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    model = AutoModelForCausalLM.from_pretrained(folder)
    architecture = read_architecture(skeleton(ModelConfig(model=folder)))
    audit_tuner(get_peft_model(model, config), planned(method, architecture).tensors)


def test_what_peft_does_not_build_has_no_configuration(base_folder: Path) -> None:
    words = ["plan", "--model", str(base_folder), "--method", "houlsby", "--emit", "peft"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "has no PEFT configuration" in result.output
