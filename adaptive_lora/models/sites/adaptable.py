"""Linear layers on which an adapter would be refused or get no gradient, found without weights.

Three checks need no weights, so that plan and training agree:

- PEFT's rules: it refuses LoRA on some layers of some architectures (`out_proj` of Mamba).
- The code of the module around a layer: where it reads the layer's weight instead of calling it, as
  fused kernels do, an adapter there does not run.
- A forward pass on the meta device, with a zero added to each layer's output: a layer whose zero has
  no gradient does not reach the output. Examples are the last layer of a vision tower that is read
  one layer earlier, and Zamba2's adapters of the other places of a shared block.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adaptive_lora.models.sites.roles import PARTLY_ADAPTABLE, TESTED_TYPES

if TYPE_CHECKING:
    from torch import nn

PASSED_BY = "its weight is read by the code around it, past an adapter"
REFUSED = "PEFT refuses LoRA there"
NARROW = "AltUp mixes its few streams by it: one side is no larger than a small rank"
UNREACHED = "no forward pass leads from it to the output"


def reasons_against(model: nn.Module, towers: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], frozenset[str]]:
    """Return the linear layers that cannot take an adapter, and those for which this is unknown.

    For architectures with a table of roles, tests show that PEFT adapts all layers, that no code reads
    their weights, and that a single stack of blocks is reached completely: these are not checked again,
    except those that are only partly adaptable.

    Args:
        model: transformers model, with or without weights; all layers of other models are adaptable.
        towers: stack of blocks -> names of its linear layers.

    Returns:
        Name -> reason, and the layers that a forward pass without weights could not check: all, if the
        model's code does not run on the meta device, and those of a tower that its inputs do not reach.
    """
    settings = getattr(model, "config", None)
    if not hasattr(model, "_from_config") or settings is None:
        return {}, frozenset()
    names = [name for tower in towers.values() for name in tower]
    found: dict[str, str] = {}
    if settings.model_type not in TESTED_TYPES - PARTLY_ADAPTABLE:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            around: Any = type(model.get_submodule(parent))
            if leaf in _weights_read(around):
                found[name] = PASSED_BY
            elif ".altup." in name:
                found[name] = NARROW
        found.update(_refused_by_peft(model, names))
    elif len(towers) == 1:
        return {}, frozenset()
    try:
        bones = _bones(model)
        with _without_values():
            unreached = unreached_layers(bones, names, lambda: _summed(bones(**_inputs(bones))))
    except Exception as error:  # a model's own code can raise anything without weights
        logging.getLogger(__name__).info("no forward pass without weights: %s", error)
        return found, frozenset(names)
    untried = {name for tower in towers.values() if unreached.issuperset(tower) for name in tower}
    return {**dict.fromkeys(unreached - untried, UNREACHED), **found}, frozenset(untried)


def _refused_by_peft(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Return name -> reason by PEFT's rule for architectures, without attaching anything."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    config, found = LoraConfig(target_modules=list(names)), {}
    for name in names:
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            found[name] = REFUSED
    return found


_FUSED = ("gate_proj", "up_proj", "w1", "w3")
"""Names of experts' layers that PEFT's rule takes in pairs alone."""


def taken_for_experts(model: Any, names: Iterable[str]) -> frozenset[str]:
    """Return the linear layers that PEFT's configuration takes for parts of routed experts, by their last names.

    In families that exist with experts it turns `gate_proj`, `up_proj` and `down_proj` of `target_modules` into the
    experts' 3-D weights, also where they are layers of a shared expert or of a dense block (Qwen2-MoE, DeepSeek,
    Qwen3-Next). Such layers are adapted by their weights, in `target_parameters`.
    """
    if not hasattr(model, "_from_config"):
        return frozenset()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    wanted = set(names)
    config = LoraConfig(target_modules=[*wanted, *_FUSED])
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    return frozenset(wanted - set(config.target_modules or ()))


_QUESTIONS = ("data", "device", "dtype", "shape")


@lru_cache(maxsize=256)
def _weights_read(kind: Any) -> frozenset[str]:
    """Return the submodules whose weights a class passes on instead of calling them.

    Reading a weight's attributes (`self.wo.weight.dtype`) and initialising it do not count.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    asked, read = set(), set()
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or "init" in method.name:
            continue
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                if node.attr in _QUESTIONS:
                    asked.add(node.value)
                owner = node.value.value
                if node.attr == "weight" and isinstance(owner, ast.Name) and owner.id == "self":
                    read.add(node)
    return frozenset(node.value.attr for node in read - asked)  # type: ignore[attr-defined]


def _bones(model: Any) -> Any:
    """Return the model's architecture on the meta device; the model itself if it is there already."""
    import torch

    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    settings = copy.deepcopy(model.config)
    vars(settings).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)._from_config(settings)


def unreached_layers(model: Any, names: Sequence[str], output: Callable[[], Any]) -> set[str]:
    """Return the linear layers without influence on an output of the model.

    Args:
        model: model with or without weights.
        names: names of its linear layers.
        output: function that runs the model and returns a scalar.
    """
    import torch

    device = next(model.parameters()).device
    zeros = {name: torch.zeros((), device=device, requires_grad=True) for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, zero=zero: output + zero)
        for name, zero in zeros.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            found = output()
            if not found.requires_grad:
                return set(names)
            given = torch.autograd.grad(found, [*zeros.values()], allow_unused=True)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name for name, gradient in zip(names, given, strict=True) if gradient is None}


@contextmanager
def _without_values() -> Iterator[None]:
    """Run code on the meta device inside the block; every condition on values is taken to be true.

    Masks are then all ones: no padding, one sequence per row, no padded images.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    def places(mask: Any) -> list[Any]:
        if mask is None or mask.dtype != torch.bool:
            return [mask]
        return [torch.empty(mask.numel(), dtype=torch.long, device="meta")] * mask.dim()

    class Holds(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1
            if func is aten.nonzero.default:
                return torch.stack(places(args[0]), dim=1)
            if func is aten.index.Tensor:
                args = (args[0], [place for mask in args[1] for place in places(mask)])
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Holds():
        yield


_TOKENS = 8


def _inputs(model: Any) -> dict[str, Any]:
    """Return inputs of a model for the arguments of its forward pass: text, image or audio."""
    import torch

    taken = inspect.signature(model.forward).parameters
    text = model.config.get_text_config()
    vision = getattr(model.config, "vision_config", model.config)
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    found: dict[str, Any] = {}
    if "input_ids" in taken:
        found["input_ids"] = ids
    if "decoder_input_ids" in taken and model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids
    if "input_features" in taken:
        sound = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        found["input_features"] = torch.zeros(sound, device="meta")
    side = getattr(vision, "image_size", None)
    if "pixel_values" in taken and side is not None:
        sides = (side, side) if isinstance(side, int) else tuple(side)
        one = (1, 1) if "pixel_attention_mask" in taken else (1,)  # several images a text
        shape = (*one, getattr(vision, "num_channels", 3), *sides)
        found["pixel_values"] = torch.zeros(shape, device="meta")
    if "use_cache" in taken and hasattr(text, "use_cache"):
        found["use_cache"] = False
    return found


def _summed(outputs: Mapping[str, Any]) -> Any:
    """Return the sum of a model's outputs that a task uses."""
    import torch

    for name in ("logits", "logits_per_image"):
        if outputs.get(name) is not None:
            return outputs[name].float().sum()
    floats = [v for v in outputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return torch.stack([value.float().sum() for value in floats]).sum()
