"""Quantised bases, quantised by bitsandbytes on loading or before saving, in training and serving.

QLoRA (Dettmers et al. 2023, 2305.14314): weights of linear layers are frozen in 4-bit NormalFloat,
their scales are quantised again (double quantisation), and every product is computed in the base's
type. Embeddings, norms, modules on top of the base, and layers that transformers never quantises are
not quantised.

A base saved in NF4 is used as such. A base saved in another format that can be dequantised on any
machine is dequantised.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NF4: Mapping[str, Any] = MappingProxyType({"scheme": "nf4", "double": True})
"""Entry of an adapter's record for a quantised base."""


@dataclass(frozen=True)
class SavedQuantisation:
    """Quantisation of a base's saved weights."""

    name: str
    """Name of the format, for display."""
    use: str
    """Use in training: `nf4` as saved, `dequantised`, or empty for unsupported formats."""
    double: bool = True
    """Mark of NF4 whose scales are quantised again."""


_OTHER_FILES: Mapping[str, str] = MappingProxyType(
    {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
)
"""Name of a settings file next to config.json -> name of its quantisation format."""


def saved_quantisation(folder: Path) -> SavedQuantisation | None:
    """Return the quantisation of the weights in a model folder, by its settings alone.

    None also if config.json cannot be read, which other code reports.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = quantisation_in(settings) if isinstance(settings, dict) else None
    others = (name for file, name in _OTHER_FILES.items() if (folder / file).is_file())
    other = next(others, None)
    return found if found is not None or other is None else SavedQuantisation(other, "")


def quantisation_in(settings: Mapping[str, Any]) -> SavedQuantisation | None:
    """Return the quantisation in a configuration, also in nested ones."""
    found = settings.get("quantization_config", settings.get("compression_config"))
    if "bits" in (settings.get("quantization") or ()):
        return SavedQuantisation("MLX", "")
    if not isinstance(found, dict):
        inner = (quantisation_in(value) for value in settings.values() if isinstance(value, dict))
        return next(filter(None, inner), None)
    method = str(found.get("quant_method", "bitsandbytes" if _loads(found) else "unknown"))
    if method.startswith("bitsandbytes"):
        if _loads(found) != "load_in_4bit":
            return SavedQuantisation("bitsandbytes 8 bit", "dequantised")
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        double = bool(found.get("bnb_4bit_use_double_quant", False))
        use = "nf4" if kind == "nf4" else "dequantised"
        return SavedQuantisation(f"bitsandbytes 4 bit ({kind.upper()})", use, double)
    if method == "fp8":
        return SavedQuantisation("FP8", "dequantised")
    return SavedQuantisation(method.upper() if len(method) < 5 else method, "")


def _loads(found: Mapping[str, Any]) -> str | None:
    """Return the set one of bitsandbytes' two switches, or None."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if found.get(name) or found.get(f"_{name}"):
            return name
    return None


def quantised_settings(record: Mapping[str, Any], dtype: torch.dtype, model: Any) -> Any:
    """Return transformers' settings for a recorded quantisation.

    Args:
        record: record of the quantisation, such as `NF4`.
        dtype: type in which products are computed.
        model: architecture to load, without weights.

    Raises:
        ImportError: bitsandbytes is missing or does not load.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of a missing kernel that `settle` excludes anyway
    try:
        import bitsandbytes  # noqa: F401 - transformers asks for it later, with another error
    finally:
        log.setLevel(level)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=record["scheme"],
        bnb_4bit_use_double_quant=record["double"],
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=record.get("storage"),
        llm_int8_skip_modules=_kept(model),  # also for 4 bit, despite its name
    )


def packed_layers(model: Any) -> frozenset[str]:
    """Return the names of the linear layers that are, or would be, in 4 bit."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = dict(model.named_modules())
    packed = {n for n, m in modules.items() if hasattr(getattr(m, "weight", None), "quant_state")}
    if packed:
        return frozenset(packed)
    kept = _kept(model)
    return frozenset(
        name
        for name, module in modules.items()
        if (isinstance(module, Conv1D) or type(module) is Linear) and should_convert_module(name, kept)
    )


def _kept(model: Any) -> list[str]:
    """Return the names of modules that are not quantised, in transformers' form.

    They are chosen by transformers (tied weights, output embeddings, layers excluded by the
    architecture: T5 casts the input of `wo` to the type of its weight, which in 4 bit is uint8) or by
    the saved model, and include modules that a task may train: those on top of the base, and poolers.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    if not hasattr(model, "all_tied_weights_keys"):
        return []  # not a transformers model, which is never loaded this way
    forbidden = model._keep_in_fp32_modules or ()
    saved = getattr(model.config, "quantization_config", None)
    chosen = saved.get("llm_int8_skip_modules") if isinstance(saved, dict) else None
    if chosen is not None and model.get_output_embeddings() is not None:
        return sorted({*chosen, *forbidden})
    prefix = model.base_model_prefix
    on_top = [n for n, _ in model.named_children() if n != prefix] if hasattr(model, prefix) else []
    poolers = [n for n, _ in model.named_modules() if n.rpartition(".")[2] == "pooler"]
    usual = get_keys_to_not_convert(model) if chosen is None else chosen
    return sorted({*usual, *on_top, *poolers, *forbidden})


def saved_settings(settings: Any, dtype: torch.dtype, model: Any) -> Any:
    """Return the configuration for loading a base saved in 4 bit.

    Args:
        settings: configuration of the base; changed in place.
        dtype: type in which products are computed, instead of the saved one.
        model: architecture to load, without weights.
    """
    settings.quantization_config = {
        **settings.quantization_config,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": _kept(model),
    }
    return settings


def dequantised(model: Any, bones: Any, dtype: torch.dtype) -> Any:
    """Return a model with plain linear layers that have the dequantised weights.

    Args:
        model: model with linear layers of bitsandbytes; it is changed.
        bones: its architecture without weights, whose layers replace them.
        dtype: type of the weights.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    for name, module in list(model.named_modules()):
        if type(getattr(module, "weight", None)).__name__ not in ("Params4bit", "Int8Params"):
            continue
        plain = bones.get_submodule(name)
        weight = dequantize_module_weight(module).detach().to(dtype)
        if not hasattr(plain, "out_features"):  # GPT-2's Conv1D stores weights as (in, out)
            weight = weight.T.contiguous()
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            plain.bias = module.bias
        model.set_submodule(name, plain)
    if hasattr(model, "hf_quantizer"):  # if transformers has not dequantised it itself
        model.hf_quantizer.remove_quantization_config(model)
    model._weight_conversions = None  # otherwise transformers would save it in the quantised format
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)
    return model.eval()


_BLOCK = 64
"""Number of weights per scale."""


def settle(model: Any) -> None:
    """Make a quantised model compute with its exact dequantised weights, in training and evaluation.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 repacks the weights in evaluation, for a bfloat16
    kernel that it would download from the hub. On any CPU it reads the scales row by row: a width
    that is not a multiple of the block gives wrong weights (relative error 0.24 to 0.40 instead of
    NF4's 0.09).

    Raises:
        ValueError: a layer on a CPU has such a width.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % _BLOCK and module.weight.device.type == "cpu":
                raise ValueError(
                    f"{name} takes {module.in_features} inputs: in 4 bit on a CPU required a "
                    f"multiple of {_BLOCK}, because bitsandbytes decodes others wrongly there"
                )
