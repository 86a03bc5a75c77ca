"""Base models, sites and precision."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.allocation.site import Placement, Role, SiteChoice, select_sites
from adaptive_lora.config import ModelConfig, study_from
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.models.base import count_parameters, load_base, locate, skeleton
from adaptive_lora.models.device import resolve_precision, start_runtime
from adaptive_lora.models.sites import find_sites
from adaptive_lora.runner.plan import plan_method
from adaptive_lora.serving import content_hash


def test_gpt2_roles_by_parent(base_folder: Path) -> None:
    sites = find_sites(skeleton(ModelConfig(model=str(base_folder))))
    block = {s.name: (s.role, s.in_features, s.out_features) for s in sites if s.layer == 1}
    assert block == {
        "transformer.h.1.attn.c_attn": (Role.QKV, 32, 96),
        "transformer.h.1.attn.c_proj": (Role.OUTPUT, 32, 32),
        "transformer.h.1.mlp.c_fc": (Role.UP, 32, 128),
        "transformer.h.1.mlp.c_proj": (Role.DOWN, 128, 32),
    }
    assert len(select_sites(sites, SiteChoice(placement=Placement.FEED_FORWARD))) == 6


def test_llama_roles() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99,
    )  # fmt: skip
    with torch.device("meta"):
        sites = find_sites(AutoModelForCausalLM.from_config(config))
    assert [site.role for site in sites if site.layer == 0] == [
        Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT, Role.GATE, Role.UP, Role.DOWN,
    ]  # fmt: skip
    assert {s.out_features for s in sites if s.role == Role.KEY} == {16}


def test_a_type_of_several_classes_is_built_as_its_checkpoint_names_it(tmp_path: Path) -> None:
    """DeiT has two classifiers; sites are named as in the one that is trained, and none is chosen by chance."""
    settings = AutoConfig.for_model(
        "deit", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=16, architectures=["DeiTForImageClassificationWithTeacher"],
    )  # fmt: skip
    settings.save_pretrained(tmp_path)
    base = ModelConfig(model=str(tmp_path))
    assert type(skeleton(base)).__name__ == "DeiTForImageClassificationWithTeacher"
    names = [site.name for site in find_sites(skeleton(base))]
    assert names == [site.name for site in find_sites(skeleton(base, "image_classification"))]
    settings.architectures = None
    settings.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"names no class, and .* several for the type 'deit': required one of DeiT"):
        skeleton(base, "image_classification")


def test_a_model_without_blocks_has_no_sites() -> None:
    with pytest.raises(ModelError, match="no adaptable site"):
        find_sites(torch.nn.Sequential(torch.nn.ReLU()))


def test_dialogpt_medium_without_weights(shared_models: Path) -> None:
    config = ModelConfig(model=str(shared_models / "dialogpt-medium"))
    settings = {"model": config.model, "precision": "fp32", "batch_size": 8, "max_tokens": 512}
    report = plan_method(study_from(settings), MethodSpec.parse("uniform:rank=8"))
    assert report.total_parameters == 354_823_168
    assert report.plan.trainable_parameters == 3_145_728
    assert report.uniform_rank == 8
    with pytest.raises(ModelError, match="no weights"):
        load_base(config, torch.float32)


def test_base_is_frozen_and_hashed_by_content(base_folder: Path, tmp_path: Path) -> None:
    base = load_base(ModelConfig(model=str(base_folder)), torch.float32)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.total_parameters == count_parameters(skeleton(ModelConfig(model=str(base_folder))))
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    (copy / "notes.txt").write_text("not part of the model")
    assert content_hash(copy) == base.reference.content_hash
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert content_hash(copy) != base.reference.content_hash


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        locate(ModelConfig(model=name))


def test_unreachable_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        locate(ModelConfig(model="nobody/nothing-at-all"))


def test_hub_model_from_the_local_cache(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub code path works on a cached snapshot, whether it was fetched now or before."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(base_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = load_base(ModelConfig(model="someone/tiny"), torch.float32)
    assert (base.reference.source, base.reference.revision) == ("hub", commit)
    assert base.reference.content_hash == content_hash(base_folder)


def test_a_plan_fetches_the_configuration_alone(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, revision, allow_patterns))
        shutil.copy(base_folder / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = skeleton(ModelConfig(model="someone/seventy-billion", revision="v1"))
    assert asked == [("someone/seventy-billion", "v1", ["config.json"])]
    assert count_parameters(model) > 0


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"required config\.json"):
        locate(ModelConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        skeleton(ModelConfig(model=str(tmp_path)))


Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def rewritten(base: Path, folder: Path, change: Callable[[Weights], Any], **config: Any) -> Path:
    """Return a copy of a base with other weights and settings."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


NOT_OF_ONE_MODEL: dict[str, tuple[Callable[[Weights], Any], dict[str, Any], str]] = {
    "a layer more": (lambda w: None, {"num_hidden_layers": 3}, "lacks 9 weights of the base"),
    "one weight less": (lambda w: w.pop(UP), {}, f"lacks 1 weights .* {UP}"),
    "no head": (lambda w: w.pop("lm_head.weight"), {}, "lacks 1 weights .* lm_head.weight"),
    "other sizes": (lambda w: None, {"intermediate_size": 48}, "as 32 x 64, .* requires 32 x 48"),
    "biases": (
        lambda w: w.update({UP.replace("weight", "bias"): torch.ones(64)}), {},
        "has 1 weights of layers .* without them .*bias.*: the model would compute something els",
    ),
    "scales": (
        lambda w: w.update({f"{UP}_scale": torch.ones(1)}), {}, "those of a quantised one name",
    ),
    "whole numbers": (
        lambda w: w.update({UP: (w[UP] * 100).to(torch.int8)}), {}, f"{UP} in integers .I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_OF_ONE_MODEL)
def test_weights_and_settings_are_of_one_model(name: str, llama_folder: Path, tmp_path: Path) -> None:
    """Otherwise transformers fills up with random weights, or leaves some out, and only logs it."""
    change, config, said = NOT_OF_ONE_MODEL[name]
    folder = rewritten(llama_folder, tmp_path / "base", change, **config)
    with pytest.raises(ModelError, match=said):
        load_base(ModelConfig(model=str(folder)), torch.float32)


def test_layers_that_are_left_out_are_said(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a cut model leaves them out, or one without the layers that predict further tokens."""
    folder = rewritten(llama_folder, tmp_path / "base", lambda w: None, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        load_base(ModelConfig(model=str(folder)), torch.float32)
    assert "9 weights of the checkpoint have no place in LlamaForCausalLM" in caplog.text


def test_files_that_are_not_weights(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "base")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        load_base(ModelConfig(model=str(folder)), torch.float32)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="It is an adapter; give its base"):
        locate(ModelConfig(model=str(folder)))


def test_precision_on_a_cpu() -> None:
    assert resolve_precision("auto", cpu=True) in ("fp32", "bf16")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision("fp16", cpu=True)
    assert start_runtime("bf16", cpu=True).base_dtype == torch.bfloat16
    assert start_runtime("fp32", cpu=True).base_dtype == torch.float32
