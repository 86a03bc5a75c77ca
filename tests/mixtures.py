"""Small configurations of mixtures of experts, with the roles of their blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import save_byte_tokenizer

SIZE = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": None,
}  # fmt: skip
ATTENTION = "query key value output"
DENSE = " gate up down"
DEEPSEEK = {
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 8,
    "num_key_value_heads": 4, "q_lora_rank": 8, "head_dim": 4,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
LATENT = "query query qkv qkv output"
GEMMA = {
    "enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 8, "attention_k_eq_v": True,
    "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 258,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
}  # fmt: skip
OWN = " gate up down other other"

# class of the configuration, further settings, roles of the linear layers of both blocks, in module order
MIXTURES: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "mixtral": ("MixtralConfig", {}, (ATTENTION, ATTENTION)),
    "qwen2-moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 20}, (ATTENTION + DENSE, ATTENTION + DENSE)),
    "qwen3-moe": ("Qwen3MoeConfig", {}, (ATTENTION, ATTENTION)),
    "gpt-oss": ("GptOssConfig", {}, (ATTENTION, ATTENTION)),
    "deepseek-v2": ("DeepseekV2Config", DEEPSEEK, (LATENT + DENSE, LATENT + DENSE)),
    "deepseek-v3": ("DeepseekV3Config", DEEPSEEK, (LATENT + DENSE, LATENT + DENSE)),
    "olmoe": ("OlmoeConfig", {}, (ATTENTION, ATTENTION)),
    "granite-moe": ("GraniteMoeConfig", {}, (ATTENTION, ATTENTION)),
    "granite-moe-shared": ("GraniteMoeSharedConfig", {"shared_intermediate_size": 20},
                           (ATTENTION + " up down", ATTENTION + " up down")),
    "gemma4": ("Gemma4TextConfig", GEMMA, (ATTENTION + OWN, "query key output" + OWN)),
}  # fmt: skip
"""Families whose routed experts PEFT adapts."""

FROZEN: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "llama4": ("Llama4TextConfig", {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
               (ATTENTION + DENSE, ATTENTION + DENSE)),
    "jetmoe": ("JetMoeConfig", {}, ("qkv", "qkv")),
}  # fmt: skip
"""Families whose routed experts PEFT cannot adapt, so that they stay frozen."""


def settings_of(name: str) -> Any:
    """Return the small configuration of a family."""
    kind, further, _ = {**MIXTURES, **FROZEN}[name]
    return getattr(transformers, kind)(**{**SIZE, **further})


def save_mixture(name: str, folder: Path) -> Path:
    """Write a small base of random weights with a byte tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(settings_of(name))
        for parameter in model.parameters():  # transformers' small random weights send all tokens to few experts
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder
