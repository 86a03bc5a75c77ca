"""A frozen base whose weights are divided over the processes of a trial: FSDP2, by the launcher's options.

Only the base is sharded. Adapters are attached afterwards and stay whole in every process, in float32, beside a base in
the compute type: so ranks may differ between sites and change in training, and an adapter, its optimiser and its
checkpoints are the same with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import distributed, nn

from adaptive_lora.config.launched import process_index
from adaptive_lora.errors import ModelError, brief

if TYPE_CHECKING:
    from peft import PeftModel


def shard(model: Any, device: torch.device, head: Sequence[str] = ()) -> None:
    """Divide a base's weights over all processes, in place, layer by layer, so that no device ever holds the whole.

    Args:
        model: the base on the CPU; where the launcher asks for it, only the first process of a machine has its weights.
        device: device of this process.
        head: modules trained in addition to adapters, which stay whole.

    Raises:
        ModelError: it has no layers to divide it by, or FSDP2 does not take it.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    offload: Any = plugin.cpu_offload
    if device.type == "cpu" and isinstance(offload, CPUOffloadPolicy):
        offload = CPUOffloadPolicy(pin_memory=False)
    whole = {parameter for name in head for parameter in model.get_submodule(name).parameters()}
    whole |= {parameter for parameter in model.parameters() if parameter.ndim == 0}  # FSDP2 takes no single numbers
    layers = _layers(model, plugin.transformer_cls_names_to_wrap)
    try:
        ends = _ends(model, whole | {parameter for layer in layers for parameter in layer.parameters()})
        for unit in (*layers, *ends, model):
            if plugin.cpu_ram_efficient_loading and not getattr(model, "is_quantized", False):
                whole = _distribute(unit, device, whole)
            fully_shard(
                unit,
                mesh=init_device_mesh(device.type, (distributed.get_world_size(),)),
                reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=offload,
                mp_policy=MixedPrecisionPolicy(),  # the weights have the compute type already; autocast does the rest
                ignored_params=whole,
            )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError(f"{type(model).__name__} cannot be divided over processes by FSDP2: {brief(error)}") from error
    for module in model.modules():
        if (packing := getattr(module, "quant_state", None)) is not None:  # PEFT reads it from the weight
            module.weight.compress_statistics, module.weight.quant_type = packing.nested, packing.quant_type
    place(model, device)


def _layers(model: Any, named: Iterable[str] | None) -> list[nn.Module]:
    """Return the modules that are gathered one at a time: classes named by the launcher, or by the model itself."""
    names = set(named or getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names][::-1]  # inner ones first
    if not found:
        wanted = ", ".join(sorted(names)) or "none"
        raise ModelError(
            f"{type(model).__name__} has no layers to divide it by (classes named: {wanted}). Name the class of its "
            "layers: accelerate launch --fsdp_transformer_layer_cls_to_wrap CLASS."
        )
    return found


def _ends(model: Any, apart: set[nn.Parameter]) -> list[nn.Module]:
    """Return embeddings and output head, which are gathered by themselves unless they share a weight.

    Args:
        model: the base.
        apart: parameters that stay whole or belong to a layer.
    """
    ends: list[nn.Module] = []
    for end in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # CLIP has neither
            ends += filter(None, [getattr(model, f"get_{end}_embeddings")()])
    weights = [parameter for end in ends for parameter in end.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        return []
    return [end for end in ends if any(True for _ in end.parameters()) and apart.isdisjoint(end.parameters())]


def _distribute(unit: nn.Module, device: torch.device, whole: set[nn.Parameter]) -> set[nn.Parameter]:
    """Send the first process's weights of a unit to all, on their devices; return the new parameters of the head."""
    made: dict[int, nn.Parameter] = {}
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_sharded(parameter):
                continue
            if id(parameter) not in made:
                value = _sent(parameter.detach(), device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                whole = {made[id(parameter)] if one is parameter else one for one in whole}
            module.register_parameter(name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _sent(buffer, device)
    return whole


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    first = process_index() == 0
    value = tensor.to(device).contiguous() if first else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    distributed.broadcast(value, src=0)
    return value


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is divided over processes."""
    return hasattr(tensor, "full_tensor")


def whole_weight(module: Any) -> torch.Tensor:
    """Return a linear layer's weight as numbers, gathered and dequantised; all processes must ask for a sharded one."""
    packing, weight = getattr(module, "quant_state", None), module.weight
    if is_sharded(weight):
        weight = weight.full_tensor()
    elif packing is None or type(weight).__name__ == "Params4bit":
        return dequantize_module_weight(module).detach()
    if packing is not None:  # gathered, its weight has lost the class that PEFT knows it by
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, packing)
    numbers: torch.Tensor = weight.detach()
    return numbers


def place(model: Any, device: torch.device) -> None:
    """Move a model to a device; the sharded weights of its base stay where FSDP2 keeps them."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        model.to(device)
        return
    with torch.no_grad():
        for parameter in model.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
            if (scales := getattr(module, "quant_state", None)) is not None:  # of weights in 4 bit
                scales.to(device)


def gather_in_forward(adapted: PeftModel) -> None:
    """Let an adapter's forward gather the base's weights: PEFT calls `forward` of the base, FSDP2 hooks its call."""
    base: Any = adapted.get_base_model()
    if adapted.base_model is not base and any(is_sharded(parameter) for parameter in base.parameters()):
        adapted.base_model.forward = base.__call__
