"""The model cards of trained and exported adapters: their origin, and requirements on servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.serving import CAUSAL, TASKS


def trained_card(origin: Mapping[str, Any], *, ranks: Sequence[int]) -> str:
    """Return the README of a trained adapter.

    Args:
        origin: record of the adapter, with `base`, `method` and, unless it is LoRA, `family`.
        ranks: rank of each site; empty for tuners without ranks.
    """
    if not ranks:
        return f"""{_header(origin, "peft")}
# Adapter of the tuner {origin["family"]}

{_provenance(origin)}

{_four_bits(origin)}{_dequantised(origin)}`adaptive-lora export --merged` writes a plain model for
tuners that can be merged into the base's weights.
"""
    return f"""{_header(origin, "peft")}
# LoRA adapter

{_provenance(origin)}
- ranks: {min(ranks)} to {max(ranks)} at {len(ranks)} sites, each with the alpha of
  `adapter_config.json`; `rank_plan.json` lists them

**A server must allow rank {max(ranks)}** and support PEFT's `rank_pattern` and `alpha_pattern`. For
one that does not, `adaptive-lora export` writes one rank with scale 1 (`--uniform`) or a plain
model (`--merged`).

{_four_bits(origin)}{_dequantised(origin)}With PEFT: `PeftModel.from_pretrained(base, FOLDER)`.
"""


def uniform_card(origin: Mapping[str, Any], *, ranks: Sequence[int], rank: int) -> str:
    """Return the README of an adapter with one rank.

    Args:
        origin: record of the adapter, with `base` and, where known, `method`.
        ranks: trained rank of each site.
        rank: rank in the exported adapter.
    """
    base = _server_name(origin)
    return f"""{_header(origin, "peft")}
# LoRA adapter with one rank

{_provenance(origin)}
- ranks as trained: {min(ranks)} to {max(ranks)} at {len(ranks)} sites
- as written: rank {rank} and alpha {rank} at every site; lower ranks are padded with zeros, and each
  site's scale is folded into B, so the adapter computes the same as the trained one

**A server must allow rank {rank}**, for example

    vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME=FOLDER

{_four_bits(origin)}{_dequantised(origin)}With PEFT: `PeftModel.from_pretrained(base, FOLDER)`.
"""


def merged_card(origin: Mapping[str, Any], *, dora: bool = False) -> str:
    """Return the README of a merged model, from LoRA or DoRA layers or from another tuner."""
    added = (
        "DoRA's magnitude times the direction of the base's plus scale·B·A at every adapted site"
        if dora
        else "the base's plus scale·B·A at every adapted site"
    )
    if origin.get("family"):
        added = f"the base's with the weights trained by {origin['family']} merged"
    return f"""{_header(origin, "transformers")}
# Model with an adapter merged in

{_provenance(origin)}
- weights are {added}, rounded to {origin["dtype"]}

A server needs no adapter support and **no rank** for it: it is a plain transformers folder, loaded
by `{TASKS[origin.get("task", CAUSAL)["name"]].auto_class}.from_pretrained(FOLDER)`.
"""


def _four_bits(origin: Mapping[str, Any]) -> str:
    """Return the requirement on servers for an adapter trained on a quantised base."""
    if "quantisation" not in origin:
        return ""
    return (
        "It was trained on the base in 4 bit: serve it on the same (transformers' "
        "`BitsAndBytesConfig`,\nvLLM's `--quantization bitsandbytes`), or the model differs.\n\n"
    )


def _dequantised(origin: Mapping[str, Any]) -> str:
    """Return how to load the base for PEFT where the adapter was trained on a GGUF file."""
    base = origin["base"]
    if base["source"] != "gguf":
        return ""
    return (
        "It was trained on the dequantised weights of a GGUF file: a server that computes with "
        "the packed\nones differs a little. `base = AutoModelForCausalLM.from_pretrained(FOLDER, "
        f"gguf_file={Path(base['name']).name!r},\ndtype=torch.{origin['dtype']})` gives them.\n\n"
    )


def _header(origin: Mapping[str, Any], library: str) -> str:
    base = origin["base"]
    known = f"base_model: {base['name']}\n" if base["source"] == "hub" else ""
    return f"---\n{known}library_name: {library}\ntags:\n- lora\n- adaptive-lora\n---\n"


def _provenance(origin: Mapping[str, Any]) -> str:
    base, packed = origin["base"], ""
    if "quantisation" in origin:
        double = ", double quantisation" if origin["quantisation"]["double"] else ""
        packed = f", its linear layers in 4 bit (NF4{double})"
    if base["source"] == "gguf":
        packed = f": dequantised from this GGUF file, whose tensors are {base['stored_as']}"
    elif base.get("stored_as"):
        packed = f": dequantised from {base['stored_as']}"
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    return (
        f"- base: `{base['name']}` ({base['source']}{revision}), content hash "
        f"`{base['content_hash'][:12]}`, {origin['dtype']}{packed}\n"
        f"- method: `{origin.get('method', 'not recorded')}`, from adaptive-lora"
    )


def _server_name(origin: Mapping[str, Any]) -> str:
    return str(origin["base"]["name"]) if origin["base"]["source"] == "hub" else "BASE"
