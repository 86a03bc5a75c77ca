"""LoRA's product in one autograd step: y = x W + b + s (x Aᵀ) Bᵀ.

PEFT's layer makes a tensor for each of these operations, and autograd keeps them; here only x and
x Aᵀ are kept, and no work is done for frozen weights. With many tokens, W + s Aᵀ Bᵀ is computed first,
forward and backward, so that the outputs are written only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from adaptive_lora.models.kernels.products import compute_type, product


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Run a model's plain LoRA layers and slow activation functions by fused kernels inside the block.

    Layers with dropout, variants (DoRA ...), and trained or quantised base layers keep PEFT's code.
    The layers' weights are looked up in each call, so that ranks may change in training.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if type(module) is NewGELUActivation:
                _replace(undo, module, _gelu)
            elif type(module) is LoraLinear and _plain(module):
                _replace(undo, module, _step_of(module))
        yield


def _replace(undo: ExitStack, module: Any, forward: Any) -> None:
    """Replace one module's forward method until the block ends."""
    if "forward" not in vars(module):
        module.forward = forward
        undo.callback(vars(module).pop, "forward")


def _gelu(inputs: torch.Tensor) -> torch.Tensor:
    """Return GPT-2's GELU, which transformers computes in eight operations."""
    return functional.gelu(inputs, approximate="tanh")


def _plain(layer: Any) -> bool:
    """Return whether a layer is a frozen linear layer with one plain adapter."""
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or not base.weight.is_floating_point():
        return False
    if any(parameter.requires_grad for parameter in base.parameters()):
        return False
    adapters = layer.active_adapters
    if len(adapters) != 1 or adapters[0] not in layer.lora_A or layer.lora_variant:
        return False
    name = adapters[0]
    dropped = not isinstance(layer.lora_dropout[name], nn.Identity)
    return not (dropped or layer.lora_bias[name] or layer.lora_B[name].bias is not None)


def _step_of(layer: Any) -> Any:
    base, usual = layer.base_layer, layer.forward
    transposed = isinstance(base, Conv1D)  # its weight is (in, out)

    def step(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or layer.disable_adapters or layer.merged:
            return usual(inputs, *args, **kwargs)
        (name,) = layer.active_adapters
        weight = base.weight if transposed else base.weight.t()
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if not torch.is_grad_enabled() and _merges(inputs, weight):
            merged = _merged(weight, a, b, layer.scaling[name])
            out = product(inputs.flatten(0, -2), merged.t(), base.bias)
            return out.view(*inputs.shape[:-1], -1)
        return _Lora.apply(inputs, weight, base.bias, a, b, layer.scaling[name])

    return step


def _merges(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether to compute W + s Aᵀ Bᵀ first, which is cheaper than the update for many tokens.

    Only in float32, where this rounds no more than the sums of the update.
    """
    tokens = inputs.numel() // inputs.shape[-1]
    whole = inputs.dtype == weight.dtype == torch.float32
    kind = inputs.device.type
    return whole and not torch.is_autocast_enabled(kind) and tokens >= max(weight.shape)


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return W + s Aᵀ Bᵀ, shape (in, out)."""
    return torch.addmm(weight, a.t(), b.t(), alpha=scale)


class _Lora(torch.autograd.Function):
    """y = x W + b + s (x Aᵀ) Bᵀ with W and b frozen, in autocast's or W's type."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        dtype = compute_type(inputs, weight)
        x, w = inputs.flatten(0, -2).to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        low = product(x, a.to(dtype))
        if _merges(x, w):
            out = product(x, _merged(w, a, b, scale).t(), bias)
        else:
            out = product(x, w.t(), bias)
            out.addmm_(low, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, low, w, a, b)
        ctx.scale, ctx.shape, ctx.dtype = scale, inputs.shape, inputs.dtype
        return out.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, low, w, a, b = ctx.saved_tensors
        g = gradient.flatten(0, -2).to(w.dtype)
        back = product(g, b.to(g.dtype).t())
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[3]:
            of_a = product(back.t(), x.t()).to(a.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            of_b = product(low.t(), g.t()).t().to(b.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            if _merges(g, w):
                of_x = product(g, _merged(w, a, b, ctx.scale))
            else:
                of_x = product(g, w).addmm_(back, a.to(g.dtype), alpha=ctx.scale)
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        return of_x, None, None, of_a, of_b, None
