"""Small configurations of every supported architecture, with the roles of each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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

QWEN2_5_VL = {
    **QWEN2_VL,
    "vision_config": {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
    },
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 16, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
"""Linear attention in the first layer, attention in the second."""
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
PADDED = {"pad_token_id": 0}
MARKED = {**TEXT, **PADDED, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
GEMMA_VISION = {**IMAGE, "model_type": "siglip_vision_model"}
CLIP_VISION = {**IMAGE, "model_type": "clip_vision_model"}

FUSED = "qkv output up down"
PLAIN = "query key value output up down"
KVQ = "key value query output up down"  # OPT's order, kept by CLIP and Whisper
GATED = "query key value output gate up down"
FUSED_GATE = "query key value output up down"
CROSS = "query key value output "
KVQ_CROSS = "key value query output "
LFM2 = ("other other gate up down", "query key value output gate up down")
LFM2_TEXT = {**GROUPED, "layer_types": ["conv", "full_attention"]}

MORE = " other other other other"
SHARING = {
    **HEADED, **PADDED, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": 258,
    "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
"""The last layer takes keys and values of the first."""

# configuration class, settings, {tower: roles of every site of a block, in module order; a tuple where blocks differ}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, str | tuple[str, ...]]]] = {
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
    "llama4": ("Llama4TextConfig",
               {**HEADED, **PADDED, "intermediate_size_mlp": 64, "moe_layers": []}, {"": GATED}),
    "qwen3.5": ("Qwen3_5TextConfig", {**HEADED, **LINEAR},
                {"": ("output qkv other other other gate up down", GATED)}),
    "gemma3n": ("Gemma3nTextConfig",
                {**SHARING, "laurel_rank": 16, "altup_num_inputs": 2,
                 "activation_sparsity_pattern": [0.0, 0.0, 0.0]},
                {"": (GATED + MORE, GATED + MORE, "query output gate up down" + MORE)}),
    "gemma4": ("Gemma4TextConfig", SHARING,
               {"": (f"{GATED} other other", f"{GATED} other other", "query output gate up down other other")}),
    "smollm3": ("SmolLM3Config", {**GROUPED, **PADDED}, {"": GATED}),
    "glm": ("GlmConfig", {**HEADED, **PADDED}, {"": FUSED_GATE}),
    "glm4": ("Glm4Config", {**HEADED, **PADDED}, {"": FUSED_GATE}),
    "ministral": ("MinistralConfig", HEADED, {"": GATED}),
    "ministral3": ("Ministral3Config", HEADED, {"": GATED}),
    "olmo": ("OlmoConfig", GROUPED, {"": GATED}),
    "olmo2": ("Olmo2Config", {**GROUPED, **PADDED}, {"": GATED}),
    "olmo3": ("Olmo3Config", {**GROUPED, **PADDED}, {"": GATED}),
    "granite": ("GraniteConfig", GROUPED, {"": GATED}),
    "granite4": ("GraniteMoeHybridConfig",
                 {**GROUPED, **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 64,
                  "layer_types": ["mamba", "attention"]},
                 {"": ("up down other", "up down query key value output")}),
    "lfm2": ("Lfm2Config", LFM2_TEXT, {"": LFM2}),
    "falcon-h1": ("FalconH1Config", {**GROUPED, **MAMBA, "mamba_d_ssm": 64},
                  {"": "gate up down other query key value output"}),
    "cohere": ("CohereConfig", {**GROUPED, **PADDED}, {"": GATED}),
    "cohere2": ("Cohere2Config", {**HEADED, **PADDED}, {"": GATED}),
    "stablelm": ("StableLmConfig", GROUPED, {"": GATED}),
    "starcoder2": ("Starcoder2Config", GROUPED, {"": PLAIN}),
    "exaone4": ("Exaone4Config", GROUPED, {"": GATED}),
    "seed-oss": ("SeedOssConfig", HEADED, {"": GATED}),
    "hunyuan": ("HunYuanDenseV1Config", HEADED, {"": GATED}),
    "ernie4.5": ("Ernie4_5Config", HEADED, {"": GATED}),
    "arcee": ("ArceeConfig", GROUPED, {"": PLAIN}),
    "apertus": ("ApertusConfig", GROUPED, {"": PLAIN}),
    "nemotron": ("NemotronConfig", GROUPED, {"": PLAIN}),
    "helium": ("HeliumConfig", HEADED, {"": GATED}),
    "gpt-neo": ("GPTNeoConfig",
                {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
                 "attention_types": [[["global", "local"], 1]]}, {"": KVQ}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, {"": KVQ}),
    "gpt-bigcode": ("GPTBigCodeConfig", GPT, {"": FUSED}),
    "codegen": ("CodeGenConfig", {**GPT, "rotary_dim": 4}, {"": FUSED}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 99}, {"": FUSED}),
    "modernbert-decoder": ("ModernBertDecoderConfig", MARKED, {"": PLAIN}),
    "xlm-roberta": ("XLMRobertaConfig", TEXT, {"": PLAIN}),
    "camembert": ("CamembertConfig", TEXT, {"": PLAIN}),
    "albert": ("AlbertConfig", {**TEXT, "embedding_size": 16}, {"": (PLAIN,)}),  # one block, used in every layer
    "deberta-v1": ("DebertaConfig", TEXT, {"": "output up down"}),
    "electra": ("ElectraConfig", {**TEXT, "embedding_size": 16}, {"": PLAIN}),
    "mpnet": ("MPNetConfig", TEXT, {"": PLAIN}),
    "ernie": ("ErnieConfig", TEXT, {"": PLAIN}),
    "esm": ("EsmConfig", {**TEXT, **PADDED, "mask_token_id": 5}, {"": PLAIN}),
    "modernbert": ("ModernBertConfig", MARKED, {"": FUSED}),
    "eurobert": ("EuroBertConfig", {**TEXT, **PADDED}, {"": GATED}),
    "nomic-bert": ("NomicBertConfig", {**TEXT, **PADDED}, {"": "gate up down query key value output"}),
    "bart": ("BartConfig", BART, {"encoder": KVQ, "decoder": KVQ_CROSS + KVQ}),
    "mbart": ("MBartConfig", BART, {"encoder": KVQ, "decoder": KVQ_CROSS + KVQ}),
    "marian": ("MarianConfig", BART, {"encoder": KVQ, "decoder": KVQ_CROSS + KVQ}),
    "pegasus": ("PegasusConfig", BART, {"encoder": KVQ, "decoder": KVQ_CROSS + KVQ}),
    "m2m-100": ("M2M100Config", BART, {"encoder": KVQ, "decoder": KVQ_CROSS + KVQ}),
    "mt5": ("MT5Config", T5, {"encoder": GATED, "decoder": CROSS + GATED}),
    "umt5": ("UMT5Config", T5, {"encoder": GATED, "decoder": CROSS + GATED}),
    "t5gemma": ("T5GemmaConfig", {"encoder": HEADED, "decoder": HEADED, "vocab_size": 99},
                {"encoder": GATED, "decoder": GATED + " query key value output"}),
    "dinov2-registers": ("Dinov2WithRegistersConfig", IMAGE, {"": PLAIN}),
    "dinov3": ("DINOv3ViTConfig", IMAGE, {"": KVQ}),
    "deit": ("DeiTConfig", IMAGE, {"": PLAIN}),
    "beit": ("BeitConfig", IMAGE, {"": PLAIN}),
    "swin": ("SwinConfig",
             {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
              "window_size": 4}, {"": (PLAIN + " other", PLAIN)}),
    "siglip": ("SiglipConfig", {"text_config": TEXT, "vision_config": IMAGE},
               {"text_model": KVQ, "vision_model": KVQ}),
    "siglip2": ("Siglip2Config",
                {"text_config": TEXT, "vision_config": {**SIZE, "num_patches": 4, "patch_size": 16}},
                {"text_model": KVQ, "vision_model": KVQ}),
    "metaclip2": ("MetaClip2Config", {"text_config": TEXT, "vision_config": IMAGE},
                  {"text_model": KVQ, "vision_model": KVQ}),
    "qwen2.5-vl": ("Qwen2_5_VLConfig", QWEN2_5_VL,
                   {"visual": "qkv output gate up down", "language_model": GATED}),
    "qwen3-vl": ("Qwen3VLConfig",
                 {"text_config": {**QWEN2_VL["text_config"], "head_dim": 8},
                  "vision_config": {**QWEN2_5_VL["vision_config"], "deepstack_visual_indexes": [0]}},
                 {"visual": FUSED, "language_model": GATED}),
    "qwen3.5-vl": ("Qwen3_5Config",
                   {"text_config": {**QWEN2_VL["text_config"], **LINEAR, "head_dim": 8},
                    "vision_config": QWEN2_5_VL["vision_config"]},
                   {"visual": FUSED,
                    "language_model": ("output qkv other other other gate up down", GATED)}),
    "gemma3-vl": ("Gemma3Config",
                  {"text_config": HEADED, "vision_config": GEMMA_VISION, "mm_tokens_per_image": 4},
                  {"vision_tower": KVQ, "language_model": GATED}),
    "mistral3": ("Mistral3Config",
                 {"text_config": {**HEADED, "model_type": "mistral"},
                  "vision_config": {**IMAGE, "model_type": "pixtral", "head_dim": 8}},
                 {"vision_tower": "gate up down key value query output", "language_model": GATED}),
    "paligemma": ("PaliGemmaConfig",
                  {"text_config": {**HEADED, "model_type": "gemma"}, "vision_config": GEMMA_VISION,
                   "projection_dim": 32},
                  {"vision_tower": KVQ, "language_model": GATED}),
    "internvl": ("InternVLConfig",
                 {"text_config": {**GROUPED, "model_type": "qwen2"},
                  "vision_config": {**IMAGE, "image_size": [32, 32], "patch_size": [16, 16]}},
                 {"vision_tower": PLAIN, "language_model": GATED}),
    "llava-next": ("LlavaNextConfig",
                   {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": CLIP_VISION,
                    "vision_feature_layer": -1, "image_grid_pinpoints": [[32, 32]]},
                   {"vision_tower": KVQ, "language_model": GATED}),
    "llava-onevision": ("LlavaOnevisionConfig",
                        {"text_config": {**GROUPED, "model_type": "qwen2"}, "vision_config": GEMMA_VISION,
                         "vision_feature_layer": -1, "image_grid_pinpoints": [[32, 32]]},
                        {"vision_tower": KVQ, "language_model": GATED}),
    "lfm2-vl": ("Lfm2VlConfig",
                {"text_config": {**LFM2_TEXT, "model_type": "lfm2"},
                 "vision_config": {**SIZE, "num_patches": 4, "patch_size": 16,
                                   "model_type": "siglip2_vision_model"}},
                {"vision_tower": KVQ, "language_model": LFM2}),
    "phi4-multimodal": ("Phi4MultimodalConfig",
                        {**GROUPED, **PADDED, "vision_config": IMAGE,
                         "audio_config": {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2,
                                          "num_attention_heads": 4}},
                        {"main": "output qkv up down",
                         "embed_tokens_extend.image_embed.img_processor.encoder": KVQ,
                         "embed_tokens_extend.audio_embed.encoder": "up down query key value output up down"}),
}  # fmt: skip

LEFT_OUT: dict[str, set[str]] = {
    "gemma3n": {"correction_coefs", "prediction_coefs", "modality_router"},
    "falcon-h1": {"out_proj"}, "granite4": {"out_proj"}, "deberta-v1": {"in_proj"},
}  # fmt: skip
"""Name -> last names of the linear layers that take no adapter."""


def away_from_zero(model: Any) -> Any:
    """Set weights that start at zero, past which no gradient comes, to values of chance; return the model."""
    for name, parameter in model.named_parameters():
        if name.endswith(("correct_output_scale", "mm_input_projection_weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write_configuration(name: str, folder: Path) -> Path:
    """Write a configuration alone, as a hub folder without weights, and return its folder."""
    kind, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**settings)
    if name in ("clip", "deit"):
        config.architectures = [kind.replace("Config", "Model")]
    config.save_pretrained(folder / name)
    return folder / name
