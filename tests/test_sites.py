"""Sites and roles of every supported architecture, built from its real configuration class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LEFT_OUT, WHISPER, write_configuration
from click.testing import CliRunner
from conftest import save_byte_tokenizer
from mixtures import MIXTURES
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.cli import main
from adaptive_lora.config import ModelConfig, study_from
from adaptive_lora.errors import ModelError
from adaptive_lora.models.base import load_base, skeleton
from adaptive_lora.models.sites import TESTED_TYPES, adaptable, find_sites, role_of, site_notes, survey_sites
from adaptive_lora.models.sites.roles import PARTLY_ADAPTABLE
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.plan import PlanReport, plan_method

Folder = Callable[[str], Path]


@pytest.fixture
def folder_of(tmp_path: Path) -> Folder:
    """Return a function that writes a configuration alone."""
    return lambda name: write_configuration(name, tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_map_of_every_block_has_its_role(name: str, folder_of: Folder) -> None:
    model = skeleton(ModelConfig(model=str(folder_of(name))))
    sites = find_sites(model)
    found: dict[str, dict[int, list[str]]] = {}
    for site in sites:
        found.setdefault(site.tower, {}).setdefault(site.layer, []).append(str(site.role))
    blocks = {t: (r, r) if isinstance(r, str) else r for t, r in ARCHITECTURES[name][2].items()}
    assert found == {tower: {layer: roles.split() for layer, roles in enumerate(r)} for tower, r in blocks.items()}
    modules = dict(model.named_modules())
    for site in sites:
        weight = modules[site.name].weight
        shape = tuple(weight.shape)
        transposed = isinstance(modules[site.name], Conv1D)
        assert shape[:: 1 if transposed else -1] == (site.in_features, site.out_features)
        assert f".{site.layer}." in site.name
    assert len({site.name for site in sites}) == len(sites)
    left_out = survey_sites(model).left_out
    assert {each.rpartition(".")[2] for each in left_out} == LEFT_OUT.get(name, set())
    assert [note for note in site_notes(model, survey_sites(model)) if " no adapter: " not in note] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_map_of_the_tested_types_reaches_the_output(
    name: str, folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptable, "TESTED_TYPES", frozenset())
    survey = survey_sites(skeleton(ModelConfig(model=str(folder_of(name)))))
    assert adaptable.UNREACHED not in survey.left_out.values()
    if name not in LEFT_OUT:
        assert adaptable.REFUSED not in survey.left_out.values()
    towers = {site.tower for site in survey.sites}
    if len(towers) == 1:
        assert survey.untried == frozenset()


def test_the_tested_types_are_those_of_the_table() -> None:
    types = {getattr(transformers, kind).model_type for kind, _, _ in [*ARCHITECTURES.values(), *MIXTURES.values()]}
    assert types == TESTED_TYPES
    partly = {getattr(transformers, ARCHITECTURES[name][0]).model_type for name in LEFT_OUT}
    assert partly == PARTLY_ADAPTABLE


@pytest.mark.parametrize("name", ["t5", "clip", "whisper", "llava", "qwen2-vl"])
def test_depth_is_counted_in_each_tower(name: str, folder_of: Folder) -> None:
    report = plan(folder_of(name), "linear_decay:rank=6,low_rank=2")
    for entry in report.plan.entries:
        assert entry.rank == (6 if entry.site.layer == 0 else 2)


def test_towers_of_unequal_depth(tmp_path: Path) -> None:
    settings = {**WHISPER, "encoder_layers": 3, "decoder_layers": 2}
    transformers.WhisperConfig(**settings).save_pretrained(tmp_path)
    ranks = {
        (entry.site.tower, entry.site.layer): entry.rank
        for entry in plan(tmp_path, "linear_decay:rank=6,low_rank=2").plan.entries
    }
    assert ranks == {
        ("encoder", 0): 6, ("encoder", 1): 4, ("encoder", 2): 2,
        ("decoder", 0): 6, ("decoder", 1): 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "distilbert", "opt", "llama", "llava", "vit", "clip"])
def test_heads_projections_and_embeddings_are_no_sites(name: str, folder_of: Folder) -> None:
    model = skeleton(ModelConfig(model=str(folder_of(name))))
    names = {site.name for site in find_sites(model)}
    outside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names}
    assert not [name for name in outside if ".0." in name or ".1." in name]
    assert outside, "every one of these models has a linear map outside its blocks"


class _Block(nn.Module):
    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.mixer = nn.Linear(4, 6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(6, 12), "proj": nn.Linear(4, 4)})
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.torch_attention = nn.MultiheadAttention(4, 2) if chained else None


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_an_unknown_architecture_falls_back_to_its_structure(container: Any) -> None:
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    model.trunk = nn.Module()
    model.trunk.blocks = container(*[[_Block(True), _Block(True)]]) if (
        container is nn.ModuleList
    ) else container(_Block(True), _Block(True))  # fmt: skip
    model.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 2))])
    sites = find_sites(model)
    assert [(s.name, s.layer, s.role) for s in sites if s.layer == 1] == [
        ("trunk.blocks.1.mixer", 1, "other"),
        ("trunk.blocks.1.attn.qkv", 1, "qkv"),
        ("trunk.blocks.1.attn.proj", 1, "output"),
        ("trunk.blocks.1.mlp.0", 1, "other"),
        ("trunk.blocks.1.mlp.2", 1, "other"),
    ]
    assert len(sites) == 10
    [note] = site_notes(model, survey_sites(model))
    assert "not among the tested ones" in note
    assert "6 of them 'other'" in note


def test_the_plan_says_that_an_architecture_is_unknown(tmp_path: Path) -> None:
    transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99).save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--rank", "2"]
    shown = CliRunner().invoke(main, words, catch_exceptions=False).output
    assert "architecture 'mamba' is not among the tested ones" in shown
    values = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)
    assert "2 sites" in values["note"]


def test_a_profile_of_an_unknown_architecture_says_so_in_the_log(
    tmp_path: Path, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.AutoModelForCausalLM.from_config(
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=258)
    ).save_pretrained(tmp_path / "mamba")
    save_byte_tokenizer(tmp_path / "mamba")
    options = {"model": str(tmp_path / "mamba"), "data": str(data_file), "precision": "fp32"}
    StudyContext(study_from({**options, "template": "compact", "methods": "uniform:rank=1"}))
    assert "architecture 'mamba' is not among the tested ones" in caplog.text


def test_same_ending_other_role() -> None:
    assert role_of("h.0.attn.c_proj") == "output"
    assert role_of("h.0.mlp.c_proj") == "down"
    assert role_of("layer.3.attention.output.dense") == "output"
    assert role_of("layer.3.output.dense") == "down"
    assert role_of("layers.0.mixer.out_proj") == "other"


def test_training_wants_a_causal_model(folder_of: Folder) -> None:
    folder = folder_of("bert")
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="no causal language model"):
        load_base(ModelConfig(model=str(folder)), torch.float32)


def plan(folder: Path, method: str) -> PlanReport:
    """Plan a method on a folder without weights."""
    return plan_method(study_from({"model": str(folder)}), MethodSpec.parse(method))
