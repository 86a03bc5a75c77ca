"""Heads: modules that a task trains in addition to adapters, because the base's checkpoint lacks them.

A head is initialised from the trial's seed, equally for all methods, and is trained and saved with
the adapter. Its parameters are counted separately, because methods are compared by their adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_lora.errors import ModelError
from adaptive_lora.seeding import rng_for
from adaptive_lora.serving import Differences, saved_labels
from adaptive_lora.serving.gguf_file import read_header
from adaptive_lora.serving.tokens import known_ids, padding_id, set_for_decoder, set_padding

_OUTSIDE_BLOCKS = ("pooler",)
"""Modules of a base that a checkpoint may lack, because other training objectives do not use them."""
_SPREAD = 0.02
"""Standard deviation of new weights where the configuration gives none (BERT's, 1810.04805)."""


def find_head(model: Any, missing_keys: Sequence[str]) -> tuple[str, ...]:
    """Return the names of modules on top of the base that a task trains in addition to adapters.

    Args:
        model: model loaded for its task.
        missing_keys: names of weights missing in its checkpoint; a missing pooler is trained too.
    """
    tops = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    poolers = {
        name.rpartition(".")[0]
        for name in missing_keys
        if not _within(name, tops) and any(part in name for part in _OUTSIDE_BLOCKS)
    }
    return (*sorted(poolers), *tops)


def own_head(model: Any) -> tuple[str, ...]:
    """Return the modules of a loaded classifying model that are trained beside adapters; empty for other models."""
    from transformers.models.auto import modeling_auto as auto

    kinds = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "IMAGE_CLASSIFICATION", "QUESTION_ANSWERING")
    classes = {name for kind in kinds for name in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()}
    return find_head(model, ()) if type(model).__name__ in classes else ()


def pad_for_classes(model: Any, tokenizer: Any, folder: Path) -> int:
    """Return the padding token id of a classifying decoder, and set it in model and tokenizer.

    Raises:
        ModelError: the tokenizer has no suitable token that the base has an embedding for.
    """
    pad = padding_id(tokenizer, known_ids(model))
    if pad is None:
        raise ModelError(
            f"the tokenizer in {folder} has neither a pad nor an end-of-text token that the base "
            "has an embedding for; a decoder classifies at the last token that is not padding."
        )
    set_padding(model, pad)
    set_for_decoder(tokenizer, pad)
    return pad


def require_complete(found: Differences, head: Sequence[str]) -> None:
    """Check that a checkpoint lacks no weights but those of the head.

    Raises:
        ModelError: other weights are missing or have other shapes, so that they would be random.
    """
    lost = [name for name in found.missing if not _within(name, head)]
    besides = f" but those of {', '.join(head)}" if head else ""
    if lost:
        raise ModelError(
            f"the checkpoint lacks {len(lost)} weights of the base itself, such as {lost[0]}: they "
            f"would be random; required all weights of config.json's model{besides}."
        )
    for name, (given, wanted) in found.sizes.items():
        if not _within(name, head):
            raise ModelError(
                f"the checkpoint has {name} as {_shape(given)}, config.json requires "
                f"{_shape(wanted)}; required weights and config.json of one model."
            )


def require_read(model: Any, found: Differences, head: Sequence[str]) -> None:
    """Check that the model uses its checkpoint's weights, and log those that it does not use.

    An unused bias or scale of a layer in the model changes what that layer computes. Unused whole
    layers may be intended, such as heads of other tasks.

    Raises:
        ModelError: unused weights would change what layers compute.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    }
    parts = [name for name in found.unread if name.rpartition(".")[0] in layers]
    if parts:
        raise ModelError(
            f"the checkpoint has {len(parts)} weights of layers that config.json's model has "
            f"without them{_such_as(parts)}: the model would compute something else. Required "
            "weights and config.json of one model; those of a quantised one name its format."
        )
    prefix = f"{model.base_model_prefix}."
    others = [name for name in found.unread if not head or name.startswith(prefix)]
    if others:
        logging.getLogger(__name__).warning(
            "%d weights of the checkpoint have no place in %s and are not used%s.",
            len(others),
            type(model).__name__,
            _such_as(others),
        )


def warn_of_classes(folder: Path, labels: Sequence[str]) -> None:
    """Log a warning if the head of a checkpoint has other classes than the task.

    Args:
        folder: folder of the base, whose head is used.
        labels: classes of the task, in order.
    """
    saved = saved_labels(folder)
    if labels and sorted(saved or ()) != sorted(labels):
        logging.getLogger(__name__).warning(
            "Training starts from the head of the checkpoint, whose classes (%s) are used for %s, in this order.",
            ", ".join(saved or ["without names"]),
            ", ".join(labels),
        )


def _shape(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides)) or "one number"


def require_all_read(model: Any, file: Path, head: Sequence[str]) -> None:
    """Check that a GGUF file and the model loaded from it have the same weights.

    transformers silently ignores tensors that its model lacks, such as Llama 3.1's factors of rotary
    frequencies, or biases.

    Raises:
        ModelError: one has weights that the other lacks.
    """
    header = read_header(file)
    sizes = {name: elements for name, elements, *_ in header.tensors}
    if model.config.get_text_config().tie_word_embeddings:
        sizes.pop("output.weight", None)  # a second copy of the embeddings
    states = {state.data_ptr(): state.numel() for state in model.state_dict().values()}
    taken = sum(states.values()) - count_head(model, head)
    if sum(sizes.values()) > taken:
        others = [name for name in sizes if not name.startswith(("blk.", "output", "token_embd"))]
        raise ModelError(
            f"{file} has {sum(sizes.values()):,} weights, of which transformers uses {taken:,}: "
            f"the model would compute something else{_such_as(others, 'perhaps without')}. Give "
            "the model's own folder with config.json and *.safetensors."
        )


def _such_as(names: Sequence[str], how: str = "such as") -> str:
    return f" ({how} {', '.join(names[:3])})" if names else ""


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def start_head(model: nn.Module, missing_keys: Iterable[str], *, seed: int) -> None:
    """Initialise weights missing in the checkpoint from the seed, equally on every machine.

    Matrices are normal with the configuration's standard deviation, biases 0 and norm scales 1.
    """
    spread = float(getattr(model.config, "initializer_range", None) or _SPREAD)
    for name in missing_keys:
        weight = model.get_parameter(name)
        if weight.ndim > 1:
            draws = rng_for(seed, "head", name).standard_normal(tuple(weight.shape), "float32")
            values = torch.from_numpy(draws * spread)
        else:
            values = torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0)
        with torch.no_grad():
            weight.copy_(values)


def count_head(model: nn.Module, head: Iterable[str]) -> int:
    """Return the number of parameters of a head."""
    return sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
