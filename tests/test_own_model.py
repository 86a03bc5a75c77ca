"""Plans and profiles for a model of one's own: in memory, with batches and a loss of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import adaptive_lora as al

VOCABULARY = 97


def gpt2() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=VOCABULARY))


def texts(number: int = 6, **further: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of four texts of a few tokens, with further arguments of the model."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(number):
        ids = torch.randint(0, 7, (4, 12), generator=draws)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **further}


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
