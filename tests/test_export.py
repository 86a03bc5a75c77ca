"""Export: one rank and scale 1, or merged; the logits stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tracked import Finished
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive_lora.allocation import METHODS, MethodSpec, allocate
from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import AdapterError, ConfigError
from adaptive_lora.methods.adapters import attach, save_adapter
from adaptive_lora.methods.adapters.attach import lora_layers
from adaptive_lora.methods.adapters.export import SERVED_RANKS, export_merged, export_uniform
from adaptive_lora.models.base import load_base
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import load_adapter

IDS = torch.arange(24).reshape(2, 12)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def trained(base_folder: Path, folder: Path, method: str, policy: str = "constant") -> torch.Tensor:
    """Write an adapter whose B is not zero; return its logits."""
    base = load_base(ModelConfig(model=str(base_folder)), torch.float32)
    sites = find_sites(base.model)
    plan = allocate(MethodSpec.parse(method), sites, alpha=12.0, scaling=policy)
    adapted = attach(base.model, plan, seed=0, dropout=0.0).eval()
    numbers = torch.Generator().manual_seed(1)
    for layer in lora_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3, generator=numbers)
    template = {"with_input": "{prompt} {input}", "without_input": "{prompt}"}
    save_adapter(adapted, folder, plan=plan, base=base.reference, dtype="float32", template=template)
    with torch.no_grad():
        return adapted(IDS).logits


ADAPTERS = (
    ("uniform:rank=3", "constant"),
    ("linear_decay:rank=9,low_rank=1", "constant"),
    ("attention_heavy:rank=6", "rslora"),
    ("three_band:rank=16", "standard"),
    ("uniform:rank=8,placement=feed_forward", "rslora"),
)


@pytest.mark.parametrize("base", ["base_folder", "llama_folder"])
@pytest.mark.parametrize(("method", "policy"), ADAPTERS)
def test_both_forms_give_the_same_logits(
    base: str, method: str, policy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    before = trained(folder, tmp_path / "adapter", method, policy)
    with torch.no_grad():
        frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert not torch.allclose(frozen(IDS).logits, before, atol=0.05)

        rank = export_uniform(tmp_path / "adapter", tmp_path / "uniform")
        loaded = PeftModel.from_pretrained(frozen, str(tmp_path / "uniform")).eval()
        torch.testing.assert_close(loaded(IDS).logits, before, **TOLERANCE)

        export_merged(tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged.eval()(IDS).logits, before, **TOLERANCE)
    layers = [module for module in loaded.modules() if isinstance(module, LoraLayer)]
    assert {layer.r["default"] for layer in layers} == {rank}
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    config = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["use_rslora"] is False
    tensors = load_file(tmp_path / "uniform" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {rank}
    assert {t.shape[1] for name, t in tensors.items() if "lora_B" in name} == {rank}
    assert "lora_" not in "".join(load_file(tmp_path / "merged" / "model.safetensors"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("abc")["input_ids"]


@pytest.mark.parametrize(("largest", "served"), [(1, 8), (8, 8), (9, 16), (17, 32)])
def test_the_rank_is_rounded_up_to_what_servers_take(
    base_folder: Path, tmp_path: Path, largest: int, served: int
) -> None:
    trained(base_folder, tmp_path / "adapter", f"linear_decay:rank={largest},low_rank=1")
    assert export_uniform(tmp_path / "adapter", tmp_path / "out") == served
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"A server must allow rank {served}" in card
    assert f"--max-lora-rank {served}" in card
    assert f"method: `linear_decay-r{largest}-1`" in card
    record = json.loads((tmp_path / "adapter" / "adaptive_lora.json").read_text())
    assert record["base"]["content_hash"][:12] in card
    load_adapter(tmp_path / "out")  # it is served like any other adapter
    own = (tmp_path / "adapter" / "README.md").read_text()
    provenance = [line for line in card.splitlines() if line.startswith(("- base:", "- method:"))]
    assert len(provenance) == 2
    assert set(provenance) <= set(own.splitlines())
    assert f"A server must allow rank {largest}**" in own
    assert "More Information Needed" not in own


def test_a_rank_that_no_server_takes(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path / "adapter", "uniform:rank=4")
    name = tmp_path / "adapter" / "adapter_model.safetensors"
    wide = SERVED_RANKS[-1] + 1
    save_file(
        {
            key: torch.zeros((wide, t.shape[1]) if "lora_A" in key else (t.shape[0], wide))
            for key, t in load_file(name).items()
        },
        name,
    )
    with pytest.raises(AdapterError, match=r"rank 257; servers take at most 256.*--merged"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save="),
    ],
)
def test_what_servers_cannot_read_is_refused(
    base_folder: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, **settings)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(AdapterError, match=f"no plain LoRA adapter .*{message}"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_other_tensors_and_ranks_are_refused(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path / "adapter", "linear_decay:rank=3,low_rank=1")
    name = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(name)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, name)
    with pytest.raises(AdapterError, match="neither A nor B"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    first = next(key for key in tensors if "lora_A" in key)
    save_file({key: t for key, t in tensors.items() if key != first}, name)
    with pytest.raises(AdapterError, match="one A and one B"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    save_file({**tensors, first: torch.zeros(7, tensors[first].shape[1])}, name)
    with pytest.raises(AdapterError, match="configuration has rank"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")


def test_a_changed_base_is_not_merged(
    base_folder: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base_folder, tmp_path / "adapter", "uniform:rank=2")
    monkeypatch.setenv("ADAPTIVE_LORA_BASE", str(llama_folder))
    with pytest.raises(AdapterError, match=r"cannot be merged: base at .* has content hash"):
        export_merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


RANKED = {(kind.fit, getattr(kind, "start_from", None)): name for name, kind in METHODS.items() if kind.gives_ranks}
"""Way to train -> a method that trains so."""


@pytest.mark.parametrize("method", sorted(RANKED.values()))
def test_every_trained_adapter_can_be_exported(
    method: str, make_bench: Callable[..., StudyContext], base_folder: Path, tmp_path: Path
) -> None:
    context = make_bench(methods=f"{method}:rank=3", max_steps=20, seeds="0")
    trial = next(context.config.trials())
    run_trial(context, trial, tmp_path / "adapter")
    with torch.no_grad():
        trained, _, _ = load_adapter(tmp_path / "adapter")
        before = trained(IDS).logits
        export_uniform(tmp_path / "adapter", tmp_path / "uniform")
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "uniform")).eval()
        torch.testing.assert_close(loaded(IDS).logits, before, **TOLERANCE)
        export_merged(tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged.eval()(IDS).logits, before, **TOLERANCE)


def export(*words: object) -> Result:
    """Run the command in this process."""
    words = ("export", *words)
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_command_line(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path / "adapter", "uniform:rank=2")
    result = export(tmp_path / "adapter", tmp_path / "uniform", "--uniform")
    assert result.exit_code == 0, result.output
    assert "a server must allow rank 8" in result.output
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "adapter", tmp_path / "empty", "--merged").exit_code == 0
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert "no rank" in (tmp_path / "empty" / "README.md").read_text()
    for words, message in (
        ((tmp_path / "adapter", tmp_path / "uniform", "--uniform"), "is not empty"),
        ((tmp_path / "adapter", tmp_path / "uniform", "--merged"), "is not empty"),
        ((tmp_path / "adapter", tmp_path / "new"), "exactly one of"),
        ((tmp_path / "adapter", tmp_path / "new", "--merged", "--uniform"), "exactly one of"),
        ((tmp_path / "nowhere", tmp_path / "new", "--uniform"), "is no adapter folder"),
        (("models:/nobody@champion", tmp_path / "new", "--uniform"), "there is no tracking store"),
    ):
        failed = export(*words)
        assert failed.exit_code == 2, failed.output
        assert message in failed.output
        assert not (tmp_path / "new").exists()


def test_export_from_the_registry(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    name = finished.outcome.study_result.champion.name
    result = export(f"models:/{name}@champion", tmp_path / "out", "--uniform")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_occupied_by_a_file(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path / "adapter", "uniform:rank=2")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export_uniform(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
