"""Roles of sites by their module names.

A role is a layer's function in its block, not its name: GPT-2's `c_proj` and BERT's `output.dense`
occur both in attention and in the feed-forward part. So the name determines the role only together
with the part of the block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from adaptive_lora.allocation.site import Role

TESTED_TYPES = frozenset(
    {
        "apertus", "arcee", "albert", "bart", "beit", "bert", "bloom", "camembert", "clip", "codegen",
        "cohere", "cohere2", "deberta", "deberta-v2", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit",
        "distilbert", "electra", "ernie", "ernie4_5", "esm", "eurobert", "exaone4", "falcon",
        "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "glm",
        "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "granitemoehybrid",
        "helium", "hunyuan_v1_dense", "idefics3", "internvl", "lfm2", "lfm2_vl", "llama", "llama4_text",
        "llava", "llava_next", "llava_onevision", "m2m_100", "marian", "mbart", "metaclip_2",
        "ministral", "ministral3", "mistral", "mistral3", "modernbert", "modernbert-decoder", "mpnet", "mpt", "mt5",
        "nemotron", "nomic_bert", "olmo", "olmo2", "olmo3", "opt", "paligemma", "pegasus", "phi",
        "phi3", "phi4_multimodal", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_5",
        "qwen3_5_text", "qwen3_vl", "roberta", "seed_oss", "siglip", "siglip2", "smollm3", "smolvlm",
        "stablelm", "starcoder2", "swin", "t5", "t5gemma", "umt5", "vit", "whisper", "xlm-roberta",
        # mixtures of experts
        "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "granitemoeshared", "mixtral", "olmoe", "qwen2_moe",
        "qwen3_moe",
    }
)  # fmt: skip
"""Values of `model_type` whose blocks are compared with a table of roles by a test."""

PARTLY_ADAPTABLE = frozenset({"deberta", "falcon_h1", "gemma3n_text", "granitemoehybrid"})
"""Tested types some of whose linear layers take no adapter."""

_IN_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def _table(names: Mapping[Role, str]) -> Mapping[str, Role]:
    return MappingProxyType({name: role for role, text in names.items() for name in text.split()})


# DeBERTa's pos_*_proj give queries and keys of relative positions. GPT-2's cross-attention fuses
# key and value alone in c_attn, and DeepSeek's latent attention in kv_a and kv_b.
_ATTENTION = _table(
    {
        Role.QUERY: "q_proj query query_proj pos_query_proj q_lin q q_a_proj q_attn q_b_proj wq Wq",
        Role.KEY: "k_proj key key_proj pos_key_proj k_lin k wk Wk",
        Role.VALUE: "v_proj value value_proj v_lin v wv Wv",
        Role.QKV: ("c_attn query_key_value qkv_proj qkv Wqkv in_proj in_proj_qkv kv_proj kv_a_proj_with_mqa kv_b_proj"),
        Role.OUTPUT: ("c_proj dense out_proj o_proj out_lin o proj projection projection_layer wo Wo"),
    }
)
# gate_up_proj, input_linear and Wi fuse gate and up. T5's gate is wi_0 and its up layer wi_1, or wi if
# ungated; LFM2 counts gate, down and up as Llama's first code did. ALBERT's layers are ffn and ffn_output.
_FEED_FORWARD = _table(
    {
        Role.GATE: "gate_proj wi_0 feed_forward.w1",
        Role.UP: (
            "c_fc dense_h_to_4h fc1 fc_in up_proj gate_up_proj intermediate.dense "
            "intermediate_dense lin1 linear_fc1 wi wi_1 Wi feed_forward.w3 input_linear ffn"
        ),
        Role.DOWN: (
            "c_proj dense_4h_to_h fc2 fc_out down_proj output.dense output_dense lin2 linear_fc2 wo Wo "
            "feed_forward.w2 output_linear ffn_output"
        ),
    }
)


def role_of(name: str) -> Role:
    """Return the role of a module by its name within the block, or `other`."""
    *_, parent, leaf = f"..{name}".split(".")
    table = _ATTENTION if _IN_ATTENTION.search(name) else _FEED_FORWARD
    return table.get(f"{parent}.{leaf}") or table.get(leaf) or Role.OTHER
