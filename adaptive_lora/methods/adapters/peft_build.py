"""PEFT's configuration of a type, and the shapes that it trains, found by building it without weights."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cache, lru_cache
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.architecture import Architecture, Shape
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import ConfigError, brief, unknown_name
from adaptive_lora.methods.adapters.attach import module_targets, peft_task, stores_transposed
from adaptive_lora.methods.adapters.audit import trained_tensors
from adaptive_lora.models.errors import is_bug
from adaptive_lora.options import parse_value
from adaptive_lora.serving.other_types import register

_OURS = frozenset({"bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "modules_to_save", "target_modules"})
"""Options of configurations that follow from the plan, or that would train more than its sites."""

_Layer = tuple[AdapterSite, bool, bool]
"""A site, and whether it stores its weight as (in, out), and whether it has a bias."""


class DoesNotFit(Exception):
    """A configuration that PEFT does not build at these sites; the message has its reason."""


def config_class(kind: str) -> type[Any]:
    """Return the configuration class of a type."""
    register(kind)
    found: type[Any] = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]  # its keys are texts
    return found


@cache
def type_options(kind: str) -> Mapping[str, Any]:
    """Return the options of a type that hold one value: name -> annotation."""
    hints = typing.get_type_hints(config_class(kind))
    common = {field.name for field in dataclasses.fields(PeftConfig)} | _OURS
    names = sorted(field.name for field in dataclasses.fields(config_class(kind)) if field.name not in common)
    return {name: hints[name] for name in names if _is_single(hints[name])}


def default_of(kind: str, name: str) -> Any:
    """Return PEFT's default of an option of a type."""
    return next(field.default for field in dataclasses.fields(config_class(kind)) if field.name == name)


def _is_single(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return all(map(_is_single, typing.get_args(annotation)))
    plain = (bool, int, float, str, type(None))
    return (
        origin is typing.Literal
        or annotation in plain
        or (isinstance(annotation, type) and issubclass(annotation, Enum))
    )


def parsed(kind: str, given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the values of a type's options, read from text.

    Raises:
        ConfigError: there is no such option, or the text is no value of it; all problems at once.
    """
    known, values, problems = type_options(kind), dict[str, Any](), []
    for name, text in given:
        try:
            values[name] = parse_value(known[name], text)
            if name.endswith("dropout") and not 0 <= values[name] < 1:
                raise ValueError(f"required a probability of at least 0 and below 1, got {text!r}")
        except KeyError:
            if name in {field.name for field in dataclasses.fields(config_class(kind))}:
                problems.append(
                    f"peft: {name} of {kind} follows from the plan, or does not hold one value; leave it out. Sites "
                    "are chosen by placement, roles, layers, towers and target_names"
                )
            else:
                problems.append(f"peft: {unknown_name(f'option of {kind}', name, known)}")
        except (ValueError, TypeError) as error:
            problems.append(f"peft: option {name} of {kind}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return values


def configuration(model: nn.Module, settings: Mapping[str, Any]) -> PeftConfig:
    """Return PEFT's configuration of a plan.

    Args:
        model: model with the sites.
        settings: `type`, `targets` (full site names), and `options` of the configuration.

    Raises:
        DoesNotFit: the configuration class refuses the options.
    """
    kind, targets = config_class(settings["type"]), list(settings["targets"])
    given: dict[str, Any] = {**settings["options"], "target_modules": module_targets(model, targets)}
    if "fan_in_fan_out" in {field.name for field in dataclasses.fields(kind)}:
        given["fan_in_fan_out"] = stores_transposed(model, targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: PeftConfig = kind(task_type=peft_task(model), **given)
    except (ValueError, TypeError) as error:
        raise DoesNotFit(brief(error)) from error
    return config


def trained_shapes(base: Architecture, sites: Sequence[AdapterSite], settings: Mapping[str, Any]) -> dict[str, Shape]:
    """Return name -> shape of the tensors that a type trains at these sites, once where sites share a tensor.

    Types that look at weights are built at one site of each shape with random ones, and have equal tensors at the
    others.

    Args:
        base: architecture with the sites.
        sites: sites to adapt.
        settings: as in `configuration`, without the targets.

    Raises:
        DoesNotFit: PEFT does not build it, or it has nothing to train at a site.
    """
    layers = tuple((site, site.name in base.transposed, f"{site.name}.bias" in base.tensors) for site in sites)
    return dict(_shapes(settings["type"], json.dumps(settings["options"], sort_keys=True), layers))


@lru_cache(maxsize=512)
def _shapes(kind: str, options: str, layers: tuple[_Layer, ...]) -> dict[str, Shape]:
    """Return the trained tensors; kept, because every trial of a study plans anew.

    Args:
        kind: name of the type.
        options: options of its configuration as JSON.
        layers: layers to adapt.
    """
    settings = {"type": kind, "options": json.loads(options)}
    try:
        return _built(layers, settings, "meta")
    except NotImplementedError:  # of torch: it looks at weights
        pass
    found: dict[str, Shape] = {}
    alike: dict[tuple[int, int, bool], tuple[str, dict[str, Shape]]] = {}
    for layer in layers:
        site, transposed, _ = layer
        key = (site.in_features, site.out_features, transposed)
        if key not in alike:
            alike[key] = site.name, _built((layer,), settings, "cpu")
        name, tensors = alike[key]
        found |= {text.replace(name, site.name, 1): shape for text, shape in tensors.items()}
    return found


def _built(layers: Sequence[_Layer], settings: Mapping[str, Any], device: str) -> dict[str, Shape]:
    """Return the trained tensors of a model that has nothing but these layers."""
    bones, names = _bones(layers, device), [site.name for site, _, _ in layers]
    config = configuration(bones, {**settings, "targets": names})
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(bones, config)
    except NotImplementedError as error:
        if "meta" in str(error):
            raise
        raise DoesNotFit(brief(error)) from error
    except Exception as error:  # PEFT's types raise their own
        if is_bug(error):
            raise
        raise DoesNotFit(brief(error)) from error
    trained = {
        name
        for name, tensor in adapted.named_parameters(remove_duplicate=False)
        if tensor.requires_grad and tensor.numel()
    }
    empty = [site for site in names if not any(f".{site}." in name for name in trained)]
    if empty:
        raise DoesNotFit(f"{settings['type']} trains nothing at {len(empty)} of {len(names)} sites, such as {empty[0]}")
    return {name: tuple(tensor.shape) for name, tensor in trained_tensors(adapted).items()}


def _bones(layers: Sequence[_Layer], device: str) -> nn.Module:
    """Return a module with these linear layers, by their full names."""
    root = nn.Module()
    for site, transposed, bias in layers:
        parent, *path = root, *site.name.split(".")
        for part in path[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        with torch.device(device):
            if transposed:
                layer: nn.Module = Conv1D(site.out_features, site.in_features)
            else:
                layer = nn.Linear(site.in_features, site.out_features, bias=bias)
        parent.add_module(path[-1], layer)
    return root
