"""Small models of seven architectures as a user's script has them in memory, with batches for their own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch.nn import functional

from adaptive_lora.data.batches import IGNORED, Batch

VOCABULARY = 97
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_BARE = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
Tensors = dict[str, torch.Tensor]


def llama(width: int = 32, layers: int = 2) -> Any:
    """Return a decoder whose sites are all Linear."""
    sizes = {**_SIZES, "hidden_size": width, "num_hidden_layers": layers}
    return _made("AutoModelForCausalLM", transformers.LlamaConfig(**sizes, **_BARE))


def _gpt2() -> Any:
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _made("AutoModelForCausalLM", transformers.GPT2Config(**settings, **_BARE))


def _qwen2() -> Any:
    return _made("AutoModelForCausalLM", transformers.Qwen2Config(**_SIZES, num_key_value_heads=2, **_BARE))


def _mistral() -> Any:
    return _made("AutoModelForCausalLM", transformers.MistralConfig(**_SIZES, num_key_value_heads=2, **_BARE))


def _gpt_neox() -> Any:
    return _made("AutoModelForCausalLM", transformers.GPTNeoXConfig(**_SIZES, **_BARE))


def _bert() -> Any:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**_SIZES, **quiet, vocab_size=VOCABULARY, num_labels=3)
    return _made("AutoModelForSequenceClassification", config)


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = transformers.T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0)
    return _made("AutoModelForSeq2SeqLM", config)


def _made(kind: str, config: Any) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return getattr(transformers, kind).from_config(config)


def texts(number: int = 6, size: int = 4) -> list[Tensors]:
    """Return batches of texts whose loss is the same from a model and from this package: no label at the start."""
    draws = torch.Generator().manual_seed(1)
    made = []
    for _ in range(number):
        ids = torch.randint(0, 7, (size, 12), generator=draws)
        labels = ids.clone()
        labels[:, 0] = IGNORED
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def _classes(number: int = 6) -> list[Tensors]:
    return [{**batch, "labels": (batch["input_ids"][:, 1] == 0).long()} for batch in texts(number)]


def causal_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed loss of next tokens."""
    logits = model(**batch.inputs).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")


def _class_sum(model: Any, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum")


def _target_sum(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(**batch.inputs, labels=batch.labels).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")


Case = tuple[Callable[[], Any], Callable[[], list[Tensors]], Callable[[Any, Batch], torch.Tensor]]
ARCHITECTURES: Mapping[str, Case] = {
    "gpt2": (_gpt2, texts, causal_sum),
    "llama": (llama, texts, causal_sum),
    "qwen2": (_qwen2, texts, causal_sum),
    "mistral": (_mistral, texts, causal_sum),
    "gpt_neox": (_gpt_neox, texts, causal_sum),
    "bert": (_bert, _classes, _class_sum),
    "t5": (_t5, texts, _target_sum),
}
"""Name -> functions that make the model and its batches, and its loss summed over the targets."""
