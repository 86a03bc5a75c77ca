"""Bases whose weights are saved in few bits: told from config.json, then used or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import save_byte_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tracked import words_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from adaptive_lora.allocation import RankPlan
from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.models.base import load_base, skeleton
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import load_adapter
from adaptive_lora.serving.quantised import quantisation_in

pytest.importorskip("bitsandbytes")
BaseContext = Callable[..., StudyContext]
IDS = torch.tensor([[1, 5, 7, 9, 11, 3]])
SIZES = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, **SIZES,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.0, **SIZES)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HALF = {**NF4, "bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_use_double_quant": False}
FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nf4": (LLAMA, NF4),
    "nf4, computed in half": (LLAMA, HALF),
    "nf4, one map kept": (LLAMA, {**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]}),
    "nf4, gpt2": (GPT2, NF4),
    "fp4": (LLAMA, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": (LLAMA, {"load_in_8bit": True}),
    "int8, gpt2": (GPT2, {"load_in_8bit": True}),
    "fp8": (LLAMA, {}),
}
"""Name -> configuration and how bitsandbytes saves it."""


def save_quantised(name: str, folder: Path) -> Path:
    """Write a base of random weights, quantised."""
    config, how = FORMATS[name]
    plain = folder.with_name(f"{folder.name}-plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    if name == "fp8":
        _save_fp8(plain, folder)
    else:
        AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
        ).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def _save_fp8(plain: Path, folder: Path) -> None:
    """Write a folder as those of DeepSeek and Qwen are: a scale for each block of 64 x 64."""
    folder.mkdir()
    written = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "proj" not in name:
            written[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.view(max(1, rows // 64), -1, columns // 64, 64)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        written[name] = packed.reshape(rows, columns)
        written[f"{name}_scale_inv"] = scales
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))


def kind_of(name: str) -> str:
    return "nf4" if name.startswith("nf4") else "full"


@pytest.mark.parametrize("name", FORMATS)
def test_trained_served_and_merged(name: str, make_bench: BaseContext, tmp_path: Path) -> None:
    folder, kind = save_quantised(name, tmp_path / "base"), kind_of(name)
    method = f"uniform:rank=2,base={kind}"
    planned = json.loads(invoke("plan", "--model", folder, "--method", method, "--json").stdout)
    context = make_bench(methods=method, seeds="0", model=str(folder), max_steps=6)
    assert context.base_kind == kind
    assert context.sites == find_sites(skeleton(ModelConfig(model=str(folder))))
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert isinstance(outcome.plan, RankPlan)
    assert outcome.plan.entries == RankPlan.from_dict(planned).entries
    assert outcome.test.loss < context.base_scores(0).loss
    model, _, record = load_adapter(tmp_path / "adapter")
    assert ("quantisation" in record) == (kind == "nf4")
    probe = load_file(tmp_path / "adapter" / PROBE)["logits"]
    torch.testing.assert_close(probe_logits(context, model, 0), probe, rtol=1e-5, atol=1e-5)

    export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert ("dequantised from" in card) == (kind == "full")
    export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    if name == "nf4":
        assert "double quantisation" in card
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        served = PeftModel.from_pretrained(stock, str(tmp_path / "uniform"))
        served.train()  # in evaluation bitsandbytes rounds to bfloat16 on some CPUs
        with torch.no_grad():
            torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_stock_peft_on_the_same_base(make_bench: BaseContext, tmp_path: Path) -> None:
    folder = save_quantised("nf4", tmp_path / "base")
    context = make_bench(methods="uniform:rank=2,base=nf4", seeds="0", model=str(folder))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(stock, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    adapted.train()  # in evaluation bitsandbytes rounds to bfloat16 on some CPUs
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, context.base.model(IDS).logits)


@pytest.mark.parametrize("command", ["plan", "train", "study"])
def test_a_base_in_4_bit_asks_for_the_methods_option(command: str, options: dict[str, object], tmp_path: Path) -> None:
    folder = save_quantised("nf4", tmp_path / "base")
    method = "--methods" if command == "study" else "--method"
    words = ["--model", str(folder), method, "uniform:rank=2"]
    if command != "plan":
        words += ["--data", str(options["data"])]
    result = CliRunner().invoke(main, [command, *words])
    assert result.exit_code == 2
    assert "saved in bitsandbytes 4 bit (NF4): required base=nf4" in result.output
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_dequantised_weights_are_not_quantised_again(name: str, tmp_path: Path) -> None:
    folder = save_quantised(name, tmp_path / "base")
    plan = invoke("plan", "--model", folder, "--method", "uniform:rank=2")
    assert "dequantised" in plan.output
    refused = invoke("plan", "--model", folder, "--method", "uniform:rank=2,base=nf4", rc=2)
    assert "base=nf4 does not apply" in refused.output
    with pytest.raises(ConfigError, match="base=nf4 does not apply"):
        load_base(ModelConfig(model=str(folder)), torch.float32, quantisation={"scheme": "nf4"})


@pytest.mark.parametrize(
    ("settings", "name", "use"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ", ""),
        ({"quant_method": "awq", "bits": 4}, "AWQ", ""),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", ""),
        ({"quant_method": "mxfp4"}, "mxfp4", ""),
        ({"quant_method": "fp8"}, "FP8", "dequantised"),
        ({"load_in_8bit": True}, "bitsandbytes 8 bit", "dequantised"),
        ({"load_in_4bit": True}, "bitsandbytes 4 bit (FP4)", "dequantised"),
        ({"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes 4 bit (NF4)", "nf4"),
        ({}, "unknown", ""),
    ],
)
def test_formats_are_told_from_the_configuration(settings: dict[str, Any], name: str, use: str, tmp_path: Path) -> None:
    """With no weights on the disk at all; what cannot be trained on names the way out."""
    for whole in ({"quantization_config": settings},
                  {"text_config": {"quantization_config": settings}}):  # fmt: skip
        found = quantisation_in(whole)
        assert found is not None
        assert (found.name, found.use) == (name, use)
    LLAMA.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    if use == "":
        for base in ("full", "nf4"):
            method = f"uniform:rank=2,base={base}"
            refused = invoke("plan", "--model", tmp_path, "--method", method, rc=2)
            assert f"is saved in {name}: required weights as trained" in refused.output
            assert "Give the model that it was quantised from" in refused.output
        with pytest.raises(ModelError, match="required weights as trained"):
            load_base(ModelConfig(model=str(tmp_path)), torch.float32)


@pytest.mark.parametrize(
    ("file", "name"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"),
     ("hf_quant_config.json", "ModelOpt"), ("config.json", "MLX")],
)  # fmt: skip
def test_formats_that_keep_their_settings_elsewhere(file: str, name: str, tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    written = tmp_path / file
    settings = json.loads(written.read_text()) if written.exists() else {}
    written.write_text(json.dumps({**settings, "quantization": {"bits": 4, "group_size": 64}}))
    refused = invoke("plan", "--model", tmp_path, "--method", "uniform:rank=2", rc=2)
    assert f"is saved in {name}: required weights as trained" in refused.output


def test_profile_and_evaluate_take_a_base_in_4_bit(options: dict[str, object], tmp_path: Path) -> None:
    folder = save_quantised("nf4", tmp_path / "base")
    changes = {**options, "model": str(folder), "max_steps": 2}
    for name in ("methods", "seeds"):
        del changes[name]
    words = words_of(changes)
    shown = invoke("profile", *words_of({k: v for k, v in changes.items() if k != "lr"}))
    assert "weight_gradient over" in shown.output
    invoke("train", *words, "--method", "uniform:rank=2,base=nf4", "--adapter", tmp_path / "ad")
    for name in ("model", "lr"):
        del changes[name]
    scored = invoke("evaluate", "--adapter", tmp_path / "ad", *words_of(changes))
    assert "test/loss" in scored.output


def invoke(*words: object, rc: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == rc, (result.output, result.exception)
    return result
