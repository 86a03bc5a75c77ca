"""Small configurations of every supported architecture, with the roles of each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {**SIZE, "vocab_size": 99}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
IMAGE = {**SIZE, "image_size": 32, "patch_size": 16}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "pad_token_id": 0,
}  # fmt: skip
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
QWEN2_VL = {
    "text_config": {
        **GROUPED,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
}

FUSED = "qkv output up down"
PLAIN = "query key value output up down"
KVQ = "key value query output up down"  # OPT's order, kept by CLIP and Whisper
GATED = "query key value output gate up down"

# configuration class, settings, {tower: roles of every linear map of a block, in module order}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
             {"": FUSED}),
    "pythia": ("GPTNeoXConfig", TEXT, {"": FUSED}),
    "opt": ("OPTConfig", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 16}, {"": KVQ}),
    "bloom": ("BloomConfig", BLOOM, {"": FUSED}),
    "llama": ("LlamaConfig", GROUPED, {"": GATED}),
    "mistral": ("MistralConfig", GROUPED, {"": GATED}),
    "qwen2": ("Qwen2Config", GROUPED, {"": GATED}),
    "qwen3": ("Qwen3Config", HEADED, {"": GATED}),
    "gemma": ("GemmaConfig", HEADED, {"": GATED}),
    "gemma2": ("Gemma2Config", HEADED, {"": GATED}),
    "gemma3": ("Gemma3TextConfig", HEADED, {"": GATED}),
    "phi": ("PhiConfig", TEXT, {"": PLAIN}),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}, {"": "output qkv up down"}),
    "falcon": ("FalconConfig", {**TEXT, "ffn_hidden_size": 64}, {"": FUSED}),
    "bert": ("BertConfig", TEXT, {"": PLAIN}),
    "roberta": ("RobertaConfig", TEXT, {"": PLAIN}),
    "deberta": ("DebertaV2Config", {**DEBERTA, "share_att_key": True}, {"": PLAIN}),
    "deberta-own-position-keys": ("DebertaV2Config", {**DEBERTA, "share_att_key": False},
                                  {"": "query key value key query output up down"}),
    "distilbert": ("DistilBertConfig",
                   {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
                   {"": PLAIN}),
    "t5": ("T5Config", T5,
           {"encoder": PLAIN, "decoder": "query key value output " + PLAIN}),
    "t5-gated": ("T5Config", {**T5, "feed_forward_proj": "gated-gelu"},
                 {"encoder": GATED, "decoder": "query key value output " + GATED}),
    "vit": ("ViTConfig", IMAGE, {"": PLAIN}),
    "dinov2": ("Dinov2Config", IMAGE, {"": PLAIN}),
    "clip": ("CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE},
             {"text_model": KVQ, "vision_model": KVQ}),
    "whisper": ("WhisperConfig", WHISPER,
                {"encoder": KVQ, "decoder": "key value query output " + KVQ}),
    "llava": ("LlavaConfig",
              {"text_config": {**GROUPED, "model_type": "llama"},
               "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
               "vision_feature_layer": -1},
              {"vision_tower": KVQ, "language_model": GATED}),
    "smolvlm": ("SmolVLMConfig",
                {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": IMAGE},
                {"vision_model": KVQ, "text_model": GATED}),
    "idefics3": ("Idefics3Config",
                 {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": IMAGE},
                 {"vision_model": KVQ, "text_model": GATED}),
    "qwen2-vl": ("Qwen2VLConfig", QWEN2_VL, {"visual": FUSED, "language_model": GATED}),
}  # fmt: skip


def write_configuration(name: str, folder: Path) -> Path:
    """Write a configuration alone, as a hub folder without weights, and return its folder."""
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    if name == "clip":
        config.architectures = ["CLIPModel"]
    config.save_pretrained(folder / name)
    return folder / name
