"""Reading a base's architecture: sites, tensors and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation.architecture import Architecture, Decoder
from adaptive_lora.models.sites.find import survey_sites
from adaptive_lora.serving.tokens import position_limit

if TYPE_CHECKING:
    from torch import nn


def read_architecture(model: nn.Module) -> Architecture:
    """Read a base's architecture.

    Raises:
        ModelError: the base has no site.
    """
    head, tied = _head(model)
    survey = survey_sites(model)
    return Architecture(
        kind=type(model).__name__,
        sites=survey.sites,
        left_out=survey.left_out,
        untried=survey.untried,
        tensors={name: tuple(p.shape) for name, p in model.named_parameters()},
        norm_tensors=frozenset(
            f"{name}.{own}"
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for own, _ in module.named_parameters(recurse=False)
        ),
        head=head,
        head_tied=tied,
        decoder=_decoder(model),
    )


def _head(model: Any) -> tuple[tuple[str, ...], bool]:
    """Return the names of the head's tensors and whether they are the input embeddings.

    The head is the output embedding of a language model; in other models, all modules outside the
    backbone (classifiers and poolers of a task).
    """
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if outputs is not None:
        mine = {id(p) for p in outputs.parameters()}
        inputs = {id(p) for p in model.get_input_embeddings().parameters()}
        names = tuple(name for name, p in model.named_parameters() if id(p) in mine)
        return names, bool(mine & inputs)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == "." or not hasattr(model, prefix[:-1]):
        return (), False
    return tuple(n for n, _ in model.named_parameters() if not n.startswith(prefix)), False


def _decoder(model: Any) -> Decoder | None:
    from transformers.models.auto import modeling_auto as auto

    if type(model).__name__ not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return None
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0))
    if not heads:  # state space models
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        kv_heads = 1  # Falcon
    return Decoder(
        width=int(model.get_input_embeddings().weight.shape[1]),
        layers=int(config.num_hidden_layers),
        kv_heads=int(kv_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        max_positions=position_limit(config),
    )
