"""State-space and hybrid models: what is planned, emitted for stock PEFT and trained agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from conftest import save_byte_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_emit import built_by, emit
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import RankPlan
from adaptive_lora.config import ModelConfig
from adaptive_lora.errors import AdapterError, ModelError
from adaptive_lora.methods.adapters.export import export_merged
from adaptive_lora.models.base import skeleton
from adaptive_lora.models.classes import auto_class
from adaptive_lora.models.sites import survey_sites, taken_for_experts
from adaptive_lora.models.sites.adaptable import PASSED_BY, UNREACHED
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.trial import PROBE, probe_logits, run_trial
from adaptive_lora.serving import load_adapter

BaseContext = Callable[..., StudyContext]

TEXT = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257, "eos_token_id": 256,
    "bos_token_id": None,
}  # fmt: skip
STATE = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}  # fmt: skip
HYBRIDS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "mamba": ("MambaConfig", {"state_size": 8}, {"out_proj", "dt_proj", "x_proj"}),
    "falcon-mamba": ("FalconMambaConfig", {"state_size": 8}, {"out_proj", "dt_proj", "x_proj"}),
    "mamba2": ("Mamba2Config",
               {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
               {"out_proj"}),
    "falcon-h1": ("FalconH1Config", {**STATE, "mamba_d_ssm": 64}, {"out_proj"}),
    "nemotron-h": ("NemotronHConfig",
                   {"head_dim": 8, "hybrid_override_pattern": "M*-M", "num_hidden_layers": 4,
                    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
                    "chunk_size": 4},
                   {"out_proj"}),
    "zamba2": ("Zamba2Config",
               {"num_hidden_layers": 6, "num_key_value_heads": 4, "mamba_d_state": 8,
                "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1,
                "adapter_rank": 4, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
               {"out_proj", "0", "1"}),
    "qwen3-next": ("Qwen3NextConfig",
                   {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0,
                    "mlp_only_layers": [0, 1],
                    "layer_types": ["linear_attention", "full_attention"]},
                   set()),
    "bamba": ("BambaConfig", {**STATE, "attn_layer_indices": [1]}, {"out_proj"}),
    "jamba": ("JambaConfig",
              {"num_experts": 1, "mamba_d_state": 8, "attn_layer_period": 2,
               "attn_layer_offset": 1, "use_mamba_kernels": False},
              {"dt_proj"}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, set()),
}  # fmt: skip
"""Name -> configuration class, settings, last names of the maps that take no adapter."""


def save_hybrid(name: str, folder: Path) -> Path:
    """Write a small base of random weights with a byte tokenizer."""
    kind, settings, _ = HYBRIDS[name]
    config = getattr(transformers, kind)(**{**TEXT, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", HYBRIDS)
def test_plan_emitted_configuration_and_training_agree(name: str, make_bench: BaseContext, tmp_path: Path) -> None:
    folder = save_hybrid(name, tmp_path / "base")
    method = "uniform:rank=2"
    values = json.loads(emit(folder, method, "--json"))
    plan = RankPlan.from_dict(values)
    left_out = values["not_adaptable"]
    assert {each.rpartition(".")[2] for each in left_out} == HYBRIDS[name][2]
    assert bool(left_out) == (" no adapter: " in (values["note"] or ""))

    (tmp_path / "adapter_config.json").write_text(emit(folder, method, "--emit", "peft"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert built_by(stock, tmp_path) == {entry.site.name: (2, entry.alpha, entry.alpha / 2) for entry in plan.entries}

    context = make_bench(methods=method, seeds="0", model=str(folder), max_steps=2)
    assert dict(context.architecture.left_out) == left_out
    outcome = run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    assert isinstance(outcome.plan, RankPlan)
    assert outcome.plan.entries == plan.entries
    model, _, _ = load_adapter(tmp_path / "adapter")
    probe = load_file(tmp_path / "adapter" / PROBE)["logits"]
    torch.testing.assert_close(probe_logits(context, model, 0), probe, rtol=1e-5, atol=1e-5)

    if name == "zamba2":  # its blocks share weights, and have adapters of their own
        with pytest.raises(AdapterError, match="share one weight"):
            export_merged(tmp_path / "adapter", tmp_path / "merged")
        return
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_linear_map_of_a_block_is_a_site_or_left_out_with_its_reason(name: str, tmp_path: Path) -> None:
    """With weights as without; and what was left out as unreached has no gradient in stock PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(save_hybrid(name, tmp_path))
    survey = survey_sites(model)
    assert survey == survey_sites(skeleton(ModelConfig(model=str(tmp_path))))
    assert survey.untried == frozenset()
    maps = {
        each for each, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and each != "lm_head"
    }
    assert {site.name for site in survey.sites} | survey.left_out.keys() == maps
    unreached = {each for each, reason in survey.left_out.items() if reason == UNREACHED}
    named = {site.name for site in survey.sites} | unreached
    by_weight = taken_for_experts(model, named)
    weights = [f"{each}.weight" for each in by_weight]
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=sorted(named - by_weight), target_parameters=weights or None)
    )
    ids = torch.arange(10)[None]
    adapted(input_ids=ids, use_cache=False).logits.square().mean().backward()
    still = {
        each.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
        for each, parameter in adapted.named_parameters()
        if "lora_B" in each and (parameter.grad is None or not parameter.grad.any())
    }
    assert still == unreached


def test_the_layer_after_the_one_that_is_read_of_a_vision_tower_is_left_out() -> None:
    """LLaVA reads the last but one by default, as its released checkpoints do."""
    kind, settings, _ = ARCHITECTURES["llava"]
    config = getattr(transformers, kind)(**{**settings, "vision_feature_layer": -2})
    with torch.device("meta"):
        survey = survey_sites(auto_class(config).from_config(config))
    assert {name.split("layers.")[1].split(".")[0] for name in survey.left_out} == {"1"}
    assert set(survey.left_out.values()) == {UNREACHED}
    assert [s.layer for s in survey.sites if s.tower == "vision_tower"] == [0] * 6


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.handed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.asked(self.called(values).to(self.asked.weight.dtype))
        return torch.nn.functional.linear(values, self.handed.weight)


class _Config(transformers.PretrainedConfig):
    model_type = "around"


class _Model(transformers.PreTrainedModel):
    config_class = _Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([_Around(), _Around()])
        self.last = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        values = torch.nn.functional.one_hot(input_ids % 4, 4).float()
        if bool(input_ids.ne(-1).all()):  # asks for values
            for block in self.blocks:
                values = block(values)
        return {"logits": values}


def test_a_model_of_ones_own_is_read_like_any_other() -> None:
    survey = survey_sites(_Model(_Config()))
    assert survey.left_out == {
        "blocks.0.handed": PASSED_BY, "blocks.1.handed": PASSED_BY, "last.0.0": UNREACHED,
    }  # fmt: skip
    assert [site.name for site in survey.sites] == [
        "blocks.0.called", "blocks.0.asked", "blocks.1.called", "blocks.1.asked",
    ]  # fmt: skip
    assert survey.untried == frozenset()


def test_where_a_plan_cannot_tell_training_refuses_before_its_first_step(
    make_bench: BaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with code that does not run without weights: then an example of the data tells."""
    from adaptive_lora.models.sites import adaptable

    def fails(*given: object) -> object:
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(adaptable, "_summed", fails)
    monkeypatch.setattr(adaptable, "TESTED_TYPES", frozenset())
    context = make_bench(methods="uniform:rank=2", seeds="0")
    assert context.architecture.untried == {site.name for site in context.sites}
    lost = context.base.model.transformer.h[1]
    monkeypatch.setattr(type(lost), "forward", _skipping(type(lost).forward, lost))
    with pytest.raises(ModelError, match=r"4 linear layers of GPT2LMHeadModel .* transformer\.h\.1"):
        make_bench(methods="uniform:rank=2", seeds="0")


def _skipping(forward: Any, lost: nn.Module) -> Any:
    """Return a forward pass that goes around the block with a place."""

    def around(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self.attn.layer_idx == lost.attn.layer_idx:
            return hidden
        return forward(self, hidden, *args, **kwargs)

    return around
