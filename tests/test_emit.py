"""`plan --emit peft`: stock PEFT builds exactly the planned ranks and scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import write_configuration
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.cli import main
from adaptive_lora.methods.adapters.attach import lora_config
from adaptive_lora.models.classes import auto_class
from adaptive_lora.models.sites import find_sites

Built = dict[str, tuple[int, float, float]]
"""Site -> rank, alpha, scale."""


def built_by(model: nn.Module, folder: Path) -> Built:
    """Build an adapter_config.json with stock PEFT and read it back."""
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    return {
        name.removeprefix("base_model.model."): (
            layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"],
        )
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }  # fmt: skip


def emit(folder: Path, method: str, *words: str) -> str:
    """Return what the command prints."""
    arguments = ["plan", "--model", str(folder), "--method", method, *words]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


ARCHITECTURES = ("gpt2", "llama", "bert", "t5", "clip", "llava", "qwen2-vl", "whisper", "vit")
METHODS = (
    "uniform:rank=3",
    "linear_decay:rank=6,low_rank=2",
    "attention_heavy:rank=4",
    "three_band:budget=uniform-4",
    "uniform:rank=2,placement=feed_forward",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_stock_peft_builds_the_plan(name: str, method: str, tmp_path: Path) -> None:
    folder = write_configuration(name, tmp_path)
    (tmp_path / "adapter_config.json").write_text(emit(folder, method, "--emit", "peft"))
    plan = RankPlan.from_dict(json.loads(emit(folder, method, "--json")))
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = auto_class(settings).from_config(settings)
    assert built_by(model, tmp_path) == {
        entry.site.name: (entry.rank, entry.alpha, entry.alpha / entry.rank) for entry in plan.entries
    }


@pytest.mark.parametrize("policy", ["rslora", "standard", "constant"])
def test_scalings_are_emitted(policy: str, tmp_path: Path) -> None:
    folder = write_configuration("llama", tmp_path)
    words = ("linear_decay:rank=6,low_rank=2", "--scaling", policy)
    written = emit(folder, *words, "--emit", "peft")
    assert bool(json.loads(written)["alpha_pattern"]) is (policy == "constant")
    (tmp_path / "adapter_config.json").write_text(written)
    settings = AutoConfig.from_pretrained(folder)
    built = built_by(auto_class(settings).from_config(settings), tmp_path)
    for rank, alpha, scale in built.values():
        assert scale == alpha / (rank**0.5 if policy == "rslora" else rank)
    assert {rank for rank, _, _ in built.values()} == {2, 6}


@pytest.mark.parametrize(
    ("method", "note"),
    [("adalora:rank=4", "changes ranks in training"), ("lr_only:of=three_band", "learning-rate multipliers")],
)
def test_what_a_configuration_does_not_hold_is_said(method: str, note: str, tmp_path: Path) -> None:
    folder = write_configuration("llama", tmp_path)
    words = ["plan", "--model", str(folder), "--method", method, "--emit", "peft"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert note in result.stderr
    assert json.loads(result.stdout)["peft_type"] == "LORA"


class _Layer(nn.Module):
    """Mixes the two kinds of linear map that PEFT must be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = Conv1D(8, 12)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.fc2(torch.relu(self.fc1(values)))


class _Towers(nn.Module):
    """One tower's full names are endings of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in [*self.vision.layers, *self.layers]:
            values = layer(values)
        return values


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("towers", [("main",), ("vision",), ("main", "vision")])
def test_short_names_of_one_tower_do_not_win_in_the_other(towers: tuple[str, ...], tmp_path: Path) -> None:
    model = _Towers()
    sites = [site for site in find_sites(model) if site.tower in towers]
    assert {site.tower for site in find_sites(model)} == {"main", "vision"}
    planned = allocate(MethodSpec.parse("linear_decay:rank=4,low_rank=1"), sites)
    ranks = iter([1, 4, 2, 3, 5, 1, 2, 6])
    entries = tuple(
        type(entry)(site=entry.site, rank=(rank := next(ranks)), alpha=3.0 * rank) for entry in planned.entries
    )
    plan = RankPlan(method="made up", entries=entries, budget=None)
    before = model(torch.ones(2, 8))
    lora_config(model, plan, dropout=0.0).save_pretrained(tmp_path)
    assert built_by(model, tmp_path) == {entry.site.name: (entry.rank, entry.alpha, 3.0) for entry in entries}
    assert torch.equal(model(torch.ones(2, 8)), before)
