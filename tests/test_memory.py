"""The memory formula: held to what autograd keeps, and what is chosen by it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, write_configuration
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.cli import main
from adaptive_lora.config import MemorySize, TrainConfig, shown
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.training.memory import Load, choose, estimate, load_of

TOKENS = 128


def model_of(kind: str) -> torch.nn.Module:
    """Return a model of 4 blocks and width 256 without dropout, frozen."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    wide = {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 300,
    }  # fmt: skip
    configs = {
        "gpt2": lambda: GPT2Config(
            n_embd=256, n_layer=4, n_head=4, vocab_size=300, bos_token_id=1, eos_token_id=1,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, activation_function="gelu_pytorch_tanh",
        ),
        "llama": lambda: LlamaConfig(**wide, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**wide, num_key_value_heads=2, eos_token_id=1),
        "gpt_neox": lambda: GPTNeoXConfig(**wide, hidden_dropout=0.0),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs[kind]())
    return model.requires_grad_(False)


def kept_bytes(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps of a forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output is not None
    return sum(size for size, _ in kept.values())


def run(model: Any, ids: torch.Tensor) -> object:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("method", ["uniform:rank=8", "uniform:rank=16,placement=attention"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_the_formula_is_what_autograd_keeps(kind: str, method: str) -> None:
    model = model_of(kind)
    sites = find_sites(model)
    plan = allocate(MethodSpec.parse(method), sites)
    load = load_of(model, sites, plan, precision=Precision.FP32, longest=TOKENS)
    adapted = attach(model, plan, seed=0, dropout=0.0).train()  # type: ignore[arg-type]
    ids = torch.randint(0, 300, (2, TOKENS))
    try:
        for checkpointing in (False, True):
            with gradient_checkpointing(model, checkpointing):  # type: ignore[arg-type]
                found = kept_bytes(adapted, lambda: run(model, ids))
            expected = estimate(load, examples=2, checkpointing=checkpointing).activations
            if checkpointing:  # what one block holds for a while comes on top
                blocks = 4 * 2 * TOKENS * 256 * 4
                assert blocks <= found < expected
            else:
                assert found == pytest.approx(expected, rel=0.2)
    finally:
        detach(adapted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_an_estimate(name: str, tmp_path: Path) -> None:
    folder = write_configuration(name, tmp_path)
    result = CliRunner().invoke(main, ["plan", "--model", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    memory = json.loads(result.stdout)["memory"]
    assert 0 < memory["activations"] < memory["low"] < memory["expected"] < memory["high"]


def some_load(longest: int = 512) -> Load:
    sites = find_sites(model_of("llama"))
    return Load(
        sites=sites,
        ranks={site.name: 8 for site in sites},
        weights=4 * 10**7,
        trained_parameters=10**5,
        vocabulary=300,
        number_bytes=4,
        longest=longest,
    )


LOAD = some_load()


@given(batch=st.integers(1, 64), asked=st.booleans(), limit=st.integers(10**7, 2 * 10**9))
def test_the_choice_is_the_largest_that_fits(batch: int, asked: bool, limit: int) -> None:
    config = TrainConfig(batch_size=batch, gradient_checkpointing=asked, max_memory=MemorySize(limit))
    least = estimate(LOAD, examples=1, checkpointing=True)
    if least.high > limit:
        with pytest.raises(ConfigError, match="too little: one example of 512 tokens"):
            choose(LOAD, config)
        return
    choice = choose(LOAD, config)
    assert choice.estimate.high <= limit
    assert choice.checkpointing >= asked
    if choice.micro_batch < batch:
        double = min(batch, 2 * choice.micro_batch + 1)
        assert estimate(LOAD, examples=double, checkpointing=choice.checkpointing).high > limit
    if choice.checkpointing and not asked:
        assert estimate(LOAD, examples=1, checkpointing=False).high > limit


def test_without_a_limit_nothing_is_changed() -> None:
    choice = choose(LOAD, TrainConfig(batch_size=9))
    assert (choice.micro_batch, choice.checkpointing) == (9, False)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("500 MB", 5 * 10**8), ("8g", 8 * 10**9), ("1.5Ki", 1536), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert MemorySize(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "6 gigs", "1e9", "True"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 6GiB"):
        MemorySize(text)


def test_padded_batches_hold_more_than_packed_ones() -> None:
    whole = dataclasses.replace(LOAD, whole_logits=True, spelled_activation=True)
    packed, padded = (estimate(load, examples=4, checkpointing=False) for load in (LOAD, whole))
    tokens, blocks, inside = 4 * 512, 4, 704
    assert padded.activations - packed.activations == 3 * blocks * inside * tokens * 4
    assert padded.head - packed.head == 4 * (4 - 2) * tokens * 300


def test_sizes_are_shown() -> None:
    assert [shown(n) for n in (12, 2048, 6.5 * 2**30)] == ["12 B", "2 KiB", "6.5 GiB"]


def test_a_limit_gives_the_same_training_in_parts(
    make_bench: Callable[..., StudyContext], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"methods": "uniform:rank=2", "batch_size": 8}
    found = []
    for name, limit in (("whole", None), ("parts", "3MB"), ("least", "1.05MB")):
        context = make_bench(**more, **({} if limit is None else {"max_memory": limit}))
        for module in context.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        plan = context.plan(context.config.specs[0], seed=0, fold=0)
        assert isinstance(plan, RankPlan)
        outcome = run_trial(context, next(context.config.trials()), tmp_path / name)
        found.append((outcome.train, context.memory(plan, 0)))
    (whole, _), (parts, first), (least, second) = found
    assert whole.micro_batch == 8
    assert parts.micro_batch == first.micro_batch < 8
    assert not first.checkpointing
    assert second.checkpointing
    for other in (parts, least):
        assert other.losses == pytest.approx(whole.losses, rel=1e-6)
    assert "max_memory 1 MiB: " in caplog.text
    assert "per forward pass, with gradient checkpointing" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_a_limit_that_cannot_be_kept_stops_before_training(make_bench: Callable[..., StudyContext]) -> None:
    with pytest.raises(ConfigError, match=r"max_memory 97\.7 KiB is too little"):
        make_bench(max_memory="100KB")
