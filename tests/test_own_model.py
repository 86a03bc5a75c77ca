"""Plans and profiles for a model of one's own: in memory, with batches and a loss of any kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from html_page import Page
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import adaptive_lora as al
from adaptive_lora.errors import AllocationError, ConfigError
from adaptive_lora.methods.importance import ImportanceProfile

Measured = tuple[Any, ImportanceProfile]
"""A model and its profile."""
VOCABULARY = 97


def gpt2() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY))


def llama(width: int = 32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=VOCABULARY))


def texts(number: int = 6, **further: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of four texts of a few tokens, with further arguments of the model."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(number):
        ids = torch.randint(0, 7, (4, 12), generator=draws)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **further}


@pytest.fixture(scope="module")
def measured() -> Measured:
    """A model and its profile."""
    model = llama()
    return model, al.profile(model, texts())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_three_lines_build_what_was_planned(make: Any) -> None:
    model = make()
    profile = al.profile(model, texts())
    report = al.allocate(profile, "uniform-4", model=model)
    config = al.lora_config(model, "waterfill", budget="uniform-4", dataloader=texts())
    adapted = peft.get_peft_model(model, config)
    al.audit(adapted, report)
    assert len(set(report.plan.rank_pattern().values())) > 1
    assert report.plan.trainable_parameters <= report.plan.budget


def test_the_embedded_base_is_planned_by_its_name() -> None:
    uniform, decay = al.plan("embedded"), al.plan("embedded", "linear_decay", budget="uniform-8")
    assert decay.plan.budget == uniform.plan.trainable_parameters // 2


def test_a_profile_is_enough_to_allocate(measured: Measured, tmp_path: Path) -> None:
    model, profile = measured
    (tmp_path / "profile.json").write_text(profile.to_json(), encoding="utf-8")
    alone = al.allocate(tmp_path / "profile.json", "uniform-4")
    assert alone.plan == al.allocate(profile, "uniform-4", model=model).plan
    assert alone.to_dict()["memory"] is alone.total_parameters is None
    assert al.allocate(profile, 3000, "empirical").plan.trainable_parameters <= 3000
    with pytest.raises(AllocationError, match=r"empirical.* follows gradient_norm, but .* measured whitened_gradient"):
        al.allocate(profile, 3000, "empirical:metric=gradient_norm")
    with pytest.raises(AllocationError, match=r"uniform.* follows no importance profile"):
        al.allocate(profile, 3000, "uniform")
    with pytest.raises(AllocationError, match="budget"):
        al.allocate(profile, 3)
    with pytest.raises(ConfigError, match=r"profile .*nowhere\.json cannot be read"):
        al.allocate(tmp_path / "nowhere.json", 3000)
    with pytest.raises(ConfigError, match=r"required one: al\.allocate"):
        alone.emit("peft")


def test_a_profile_of_an_earlier_version_asks_for_its_model(measured: Measured) -> None:
    model, profile = measured
    values = profile.to_dict()
    del values["sites"]
    earlier = ImportanceProfile.from_json(json.dumps(values))
    with pytest.raises(AllocationError, match="earlier version wrote it; required model="):
        al.allocate(earlier, "uniform-4")
    assert al.allocate(earlier, "uniform-4", model=model).plan == al.allocate(profile, "uniform-4").plan


def test_a_profile_of_another_model_is_refused(measured: Measured) -> None:
    _, profile = measured
    for model, words in (
        (llama(width=48), "with 32 inputs and 32 outputs, this model has 48 and 48"),
        (llama(layers=1), "scores for 7 sites that this model lacks, such as model.layers.1"),
        (llama(layers=3), "no score for 7 of 21 sites"),
    ):
        with pytest.raises(AllocationError, match=words):
            al.plan(model, "waterfill", profile=profile)


def test_a_plan_is_shown_in_text_and_in_a_notebook(measured: Measured) -> None:
    model, profile = measured
    report = al.allocate(profile, "uniform-4", model=model)
    assert report.table[0]["site"] == "model.layers.0.self_attn.q_proj"
    assert sum(row["parameters"] for row in report.table) == report.plan.trainable_parameters
    assert {row["site"]: row["rank"] for row in report.table} == report.plan.rank_pattern()
    page = Page(report._repr_html_()).root
    sites, figures = page.all("table")
    assert len(list(sites.all("tr"))) == 1 + len(report.table)
    assert [cell.text for cell in next(sites.all("tr")).all("th")] == list(report.table.head)
    labels = [cell.text for cell in figures.all("th")]
    assert labels[:3] == ["trainable", "as much as", "memory"]
    for text in (str(report), report._repr_html_()):
        assert "model.layers.1.mlp.down_proj" in text
        assert f"{report.plan.trainable_parameters:,} of {report.total_parameters:,} parameters" in text
    assert len(repr(report)) < 200


def test_names_are_escaped_in_a_notebook() -> None:
    block = torch.nn.Module()
    block.add_module("<b>[red]", torch.nn.Linear(4, 4))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    report = al.plan(model, rank=2)
    assert "layers.0.&lt;b&gt;[red]" in report._repr_html_()
    assert "<b>[red]" not in report._repr_html_()
    assert "layers.0.<b>[red]" in str(report)
