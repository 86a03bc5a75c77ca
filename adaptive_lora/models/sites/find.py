"""Search for a model's sites by its structure: repeated blocks, and the linear layers inside them.

Blocks are the elements of the outermost module lists that have linear layers; layers outside them
(embeddings, poolers, projectors, heads) are not sites. Several lists under different parents are
towers: encoder and decoder, vision and language model.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation.architecture import Architecture, Decoder, SiteSurvey
from adaptive_lora.allocation.site import AdapterSite, Role
from adaptive_lora.errors import ModelError
from adaptive_lora.models.sites.adaptable import reasons_against
from adaptive_lora.models.sites.experts import active_experts, expert_modules, frozen_part, note_on_experts, stacks
from adaptive_lora.models.sites.roles import TESTED_TYPES, role_of
from adaptive_lora.serving import packed_layers
from adaptive_lora.serving.tokens import position_limit

if TYPE_CHECKING:
    from torch import nn

_NO_BLOCKS = re.compile(r"head|classif|pool|merger|projector|connector|router|embed")
"""Pattern of names of module lists with alternatives or outputs instead of consecutive blocks."""


def find_sites(model: nn.Module) -> tuple[AdapterSite, ...]:
    """Return all adapter sites of a model in module order; works on meta-device models too.

    Raises:
        ModelError: no linear layer in a numbered block can take an adapter.
    """
    return survey_sites(model).sites


def survey_sites(model: nn.Module) -> SiteSurvey:
    """Return the linear layers of a model, equally with weights and on the meta device.

    Raises:
        ModelError: no linear layer in a numbered block can take an adapter.
    """
    experts, frozen = expert_modules(model), dict[str, str]()
    everything = _layers_in_blocks(model)
    for site in everything:
        if (reason := frozen_part(site.name, experts)) is not None:
            frozen[site.name] = reason
    layers = tuple(site for site in everything if site.name not in frozen)
    towers: dict[str, list[str]] = {}
    for site in layers:
        towers.setdefault(site.tower, []).append(site.name)
    found, untried = reasons_against(model, towers)
    left_out = {**frozen, **found}
    sites = tuple(site for site in layers if site.name not in left_out)
    if not sites:
        among = f" that takes adapters ({left_out_text(left_out)})" if left_out else ""
        raise ModelError(
            f"{type(model).__name__} has no adaptable site: required linear layers (Linear or GPT-2 "
            f"Conv1D) inside numbered blocks such as `h.0`; found none{among}. Use a transformer "
            "model."
        )
    own = {name for name, _ in model.named_modules()}  # a module in two places has its first name alone
    if shared := [site.name for site in sites if site.name not in own]:
        raise ModelError(
            f"{type(model).__name__} has one layer in several places: {shared[0]} and {len(shared) - 1} more have an "
            "earlier name too, and an adapter on one would change the other; required layers of their own."
        )
    stacked = _expert_sites(model)
    return SiteSurvey(
        sites=sites,
        left_out=left_out,
        untried=untried,
        experts=stacked,
        experts_note=note_on_experts(model, adaptable=bool(stacked)),
    )


def _expert_sites(model: nn.Module) -> tuple[AdapterSite, ...]:
    """Return the stacks of routed experts that PEFT adapts, as sites."""
    active = active_experts(model)
    if active is None:
        return ()
    lists = [name for name, _ in _stacks(model)]
    towers = _tower_names(name.rpartition(".")[0] for name in lists)
    sites = []
    for stack in stacks(model):
        blocks = next((name for name in lists if stack.name.startswith(f"{name}.")), None)
        if blocks is None:
            continue
        inner = stack.name.removeprefix(f"{blocks}.")
        sites.append(
            AdapterSite(
                name=stack.name,
                layer=int(inner.partition(".")[0]),
                role=role_of(inner),
                in_features=stack.in_features,
                out_features=stack.out_features,
                tower=towers[blocks.rpartition(".")[0]],
                packable=False,
                experts=stack.experts,
                active=min(active, stack.experts),
            )
        )
    return tuple(sites)


def left_out_text(left_out: Mapping[str, str]) -> str:
    """Return the layers left out as text: number and names, by reason."""
    by_reason: dict[str, Counter[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, Counter())[re.sub(r"\.\d+(?=\.)", ".*", name)] += 1
    return "; ".join(
        f"{', '.join(f'{number} x {name}' for name, number in names.items())}: {reason}"
        for reason, names in by_reason.items()
    )


def _layers_in_blocks(model: nn.Module) -> tuple[AdapterSite, ...]:
    """Return all linear layers inside the blocks of a model, in module order."""
    packed = packed_layers(model)
    stacks = tuple(_stacks(model))
    towers = _tower_names(name.rpartition(".")[0] for name, _ in stacks)
    return tuple(
        AdapterSite(
            name=f"{stack}.{index}.{inner}",
            layer=int(index),
            role=role_of(f"{stack.rpartition('.')[2]}.{index}.{inner}"),
            in_features=features[0],
            out_features=features[1],
            tower=towers[stack.rpartition(".")[0]],
            packable=f"{stack}.{index}.{inner}" in packed,
        )
        for stack, blocks in stacks
        for index, block in blocks.named_children()
        for inner, features in _linear_layers(block)
    )


def site_notes(model: nn.Module, survey: SiteSurvey) -> list[str]:
    """Return remarks for the user on the sites of a model: layers left out, and untested architectures."""
    notes = []
    if survey.left_out:
        number = len(survey.left_out)
        notes.append(
            f"{number} linear layer{'s take' if number > 1 else ' takes'} no adapter: {left_out_text(survey.left_out)}."
        )
    return [*notes, *filter(None, [survey.experts_note, _architecture_note(model, survey.sites)])]


def _architecture_note(model: nn.Module, sites: Sequence[AdapterSite]) -> str | None:
    """Return a remark for the user on an untested architecture, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if kind in TESTED_TYPES:
        return None
    blocks = len({(site.tower, site.layer) for site in sites})
    unnamed = sum(site.role == Role.OTHER for site in sites)
    return (
        f"architecture '{kind}' is not among the tested ones: its {len(sites)} sites are the "
        f"linear layers found inside {blocks} repeated blocks, with roles by module name "
        f"({unnamed} of them 'other'); check the table before you rely on placement by role."
    )


def warn_of_sites(model: nn.Module, survey: SiteSurvey) -> None:
    """Log the remarks on the sites of a model as warnings."""
    for note in site_notes(model, survey):
        logging.getLogger(__name__).warning(note)


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, list of blocks), outermost lists only."""
    for name, child in module.named_children():
        if _is_stack(name, child):
            yield prefix + name, child
        else:
            yield from _stacks(child, f"{prefix}{name}.")


def _is_stack(name: str, module: nn.Module) -> bool:
    from torch import nn

    if _NO_BLOCKS.search(name):
        return False
    children = list(module.children())
    holding = [any(True for _ in _linear_layers(child)) for child in children]
    if isinstance(module, nn.ModuleList):
        return any(holding)
    # timm and hand-written models put equal blocks into a Sequential.
    return (
        isinstance(module, nn.Sequential)
        and len(children) > 1
        and all(holding)
        and len({type(child) for child in children}) == 1
    )


def _linear_layers(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (in, out)) of the linear layers of a block; Conv1D stores weights as (in, out).

    torch's MultiheadAttention uses its output layer's weight without calling the module, so an
    adapter there would never run; it is skipped.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, child in block.named_children():
        if isinstance(child, Conv1D):
            yield prefix + name, (int(child.weight.shape[0]), int(child.weight.shape[1]))
        elif isinstance(child, nn.Linear):
            yield prefix + name, (child.in_features, child.out_features)
        elif not isinstance(child, nn.MultiheadAttention):
            yield from _linear_layers(child, f"{prefix}{name}.")


def _tower_names(parents: Iterable[str]) -> dict[str, str]:
    """Return the shortest distinct name of each parent of a stack."""
    parts = {parent: parent.split(".") if parent else [] for parent in parents}
    if len(parts) == 1:
        return dict.fromkeys(parts, "")
    columns = zip(*parts.values(), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    rests = {parent: names[shared:] for parent, names in parts.items()}
    firsts = Counter(rest[0] for rest in rests.values() if rest)
    return {
        parent: "main" if not rest else rest[0] if firsts[rest[0]] == 1 else ".".join(rest)
        for parent, rest in rests.items()
    }


def read_architecture(model: nn.Module) -> Architecture:
    """Read a base's architecture.

    Raises:
        ModelError: the base has no site.
    """
    from transformers.pytorch_utils import Conv1D

    head, tied = _head(model)
    survey = survey_sites(model)
    return Architecture(
        kind=type(model).__name__,
        sites=survey.sites,
        left_out=survey.left_out,
        untried=survey.untried,
        experts=survey.experts,
        experts_note=survey.experts_note,
        tensors={name: tuple(p.shape) for name, p in model.named_parameters()},
        norm_tensors=frozenset(
            f"{name}.{own}"
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for own, _ in module.named_parameters(recurse=False)
        ),
        head=head,
        head_tied=tied,
        transposed=frozenset(site.name for site in survey.sites if isinstance(model.get_submodule(site.name), Conv1D)),
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
    if not getattr(config, "num_attention_heads", 0):  # state space models
        return None
    sizes = {_key_sizes(each) for each in getattr(config, "per_layer_config", None) or [config]}
    kv_heads, head_dim = max(sizes)
    return Decoder(
        width=int(model.get_input_embeddings().weight.shape[1]),
        layers=int(config.num_hidden_layers),
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=position_limit(config),
        no_embeddings=_BY_TOKEN if getattr(config, "hidden_size_per_layer_input", 0) else None,
        no_prefix="keys of its layers differ in size" if len(sizes) > 1 else _no_prefix(config),
    )


_BY_TOKEN = "its layers look up vectors of their own by token id, which virtual tokens have not"


def _key_sizes(config: Any) -> tuple[int, int]:
    """Return the number of key heads and the size of each, of a layer with this configuration."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon, GPT-BigCode
    return int(kv_heads), int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _no_prefix(config: Any) -> str | None:
    """Return why some layer of a decoder does not take keys and values of a prefix, or None."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers take the keys and values of others"
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        return "some of its layers keep a state of all positions instead of keys and values"
    return None
