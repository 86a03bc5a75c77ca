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
        "bert", "bloom", "clip", "deberta-v2", "dinov2", "distilbert", "falcon", "gemma", "gemma2",
        "gemma3_text", "gpt2", "gpt_neox", "idefics3", "llama", "llava", "mistral", "opt", "phi",
        "phi3", "qwen2", "qwen2_vl", "qwen3", "roberta", "smolvlm", "t5", "vit", "whisper",
    }
)  # fmt: skip
"""Values of `model_type` whose blocks are compared with a table of roles by a test."""

_IN_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def _table(names: Mapping[Role, str]) -> Mapping[str, Role]:
    return MappingProxyType({name: role for role, text in names.items() for name in text.split()})


# DeBERTa's pos_*_proj give queries and keys of relative positions. GPT-2's cross-attention fuses
# key and value alone in c_attn.
_ATTENTION = _table(
    {
        Role.QUERY: "q_proj query query_proj pos_query_proj q_lin q q_attn wq Wq",
        Role.KEY: "k_proj key key_proj pos_key_proj k_lin k wk Wk",
        Role.VALUE: "v_proj value value_proj v_lin v wv Wv",
        Role.QKV: "c_attn query_key_value qkv_proj qkv Wqkv in_proj in_proj_qkv",
        Role.OUTPUT: ("c_proj dense out_proj o_proj out_lin o proj projection projection_layer wo Wo"),
    }
)
# gate_up_proj and Wi fuse gate and up. T5's gate is wi_0 and its up layer wi_1, or wi if ungated.
_FEED_FORWARD = _table(
    {
        Role.GATE: "gate_proj wi_0",
        Role.UP: (
            "c_fc dense_h_to_4h fc1 fc_in up_proj gate_up_proj intermediate.dense "
            "intermediate_dense lin1 linear_fc1 wi wi_1 Wi"
        ),
        Role.DOWN: ("c_proj dense_4h_to_h fc2 fc_out down_proj output.dense output_dense lin2 linear_fc2 wo Wo"),
    }
)


def role_of(name: str) -> Role:
    """Return the role of a module by its name within the block, or `other`."""
    *_, parent, leaf = f"..{name}".split(".")
    table = _ATTENTION if _IN_ATTENTION.search(name) else _FEED_FORWARD
    return table.get(f"{parent}.{leaf}") or table.get(leaf) or Role.OTHER
