"""Changes of a layer's rank: remaining components keep weights and Adam's moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.adapters.attach import ADAPTER

_Change = Callable[[torch.Tensor], torch.Tensor]
_BLOCK = 256
"""Number of values that share a scale in bitsandbytes' 8-bit states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRank:
    """New rank of a layer: remaining and new components, and scale."""

    kept: Sequence[int]
    """Indices of the remaining components, in order."""
    new_a: torch.Tensor
    """A of the k new components, shape (k, in); their B is zero, so the function does not change."""
    alpha: float
    scale: float
    """Factor of the update at the new rank; B is rescaled if it changes."""


def adam_of(optimizer: Any) -> torch.optim.Optimizer:
    """Return the Adam whose moments can follow components, without accelerate's wrapper.

    Raises:
        ConfigError: another optimiser, or one that wraps it.
    """
    inner: Any = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    # Subclasses may keep further states, so that the classes themselves are compared.
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW) or _is_bitsandbytes_adam(inner):
        found: torch.optim.Optimizer = inner
        return found
    raise ConfigError(
        "components keep their Adam moments when ranks change; required AdamW or Adam of torch (foreach or fused) or "
        "of bitsandbytes (32 or 8 bit, paged or not), such as optim='adamw_torch_fused' or 'adamw_bnb_8bit'; got "
        f"{type(inner).__module__}.{type(inner).__qualname__}."
    )


def resize(layer: Any, change: NewRank, optimizer: torch.optim.Optimizer | None) -> None:
    """Replace A and B of a LoRA layer, in the model and in the optimiser.

    Args:
        layer: PEFT's LoRA layer.
        change: the new rank.
        optimizer: optimiser of A and B, one that `adam_of` returns; None: there is none yet.
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    kept = torch.tensor(change.kept, dtype=torch.long, device=a.weight.device)
    added = len(change.new_a)
    _replace(a, (kept,), change.new_a.to(a.weight), optimizer)
    zero_b, factor = b.weight.new_zeros(len(b.weight), added), layer.scaling[ADAPTER] / change.scale
    _replace(b, (slice(None), kept), zero_b, optimizer, factor)
    a.out_features = b.in_features = layer.r[ADAPTER] = len(change.kept) + added
    layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = change.alpha, change.scale


def _replace(
    linear: nn.Linear,
    kept: tuple[Any, ...],
    new: torch.Tensor,
    optimizer: torch.optim.Optimizer | None,
    factor: float = 1.0,
) -> None:
    """Replace a weight by the components at the index `kept`, times a factor, and new ones.

    Their gradients are divided by the factor. New components start without momentum and with the mean second moment
    of the remaining ones: with zero, Adam, whose bias correction has ended, would take steps of about three times the
    rate.
    """
    side = len(kept) - 1

    def joined(old: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[kept], fill.to(old.dtype)], dim=side)

    def first(moment: torch.Tensor) -> torch.Tensor:
        return joined(moment / factor, torch.zeros_like(new))

    def second(moment: torch.Tensor) -> torch.Tensor:
        moment = moment / factor**2
        return joined(moment, moment[kept].mean(dim=side, keepdim=True).expand_as(new))

    old, weight = linear.weight, nn.Parameter(joined(linear.weight.detach() * factor, new).contiguous())
    linear.weight = weight
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [weight if member is old else member for member in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state:
        return
    if "exp_avg" in state:
        changes: dict[str, _Change] = {
            "step": torch.clone,
            "exp_avg": first,
            "exp_avg_sq": second,
            "max_exp_avg_sq": second,
        }
        optimizer.state[weight] = {name: changes[name](value) for name, value in state.items()}
    else:
        _carry_over(optimizer, state, weight, first, second)


# bitsandbytes: the moments are `state1` and `state2`, each in 32 bit, or in 8 bit as codes into the table `qmap` with
# one scale (`absmax`) per block of the flattened weight. A paged state is memory of the CPU that the GPU reads.


def _is_bitsandbytes_adam(optimizer: Any) -> bool:
    """Return whether an optimiser is one of bitsandbytes' with Adam's update; Lamb, AdEMAMix and others are not."""
    kind = type(optimizer)
    return kind.__module__.startswith("bitsandbytes.optim.adam") and optimizer.optimizer_name == "adam"


@torch.no_grad()
def _carry_over(optimizer: Any, old: dict[str, Any], weight: nn.Parameter, first: _Change, second: _Change) -> None:
    """Write the changed moments into a new state, in the storage that bitsandbytes chooses for the new size."""
    import bitsandbytes.functional as bnb

    ((group, index),) = (
        (at, place)
        for at, members in enumerate(optimizer.param_groups)
        for place, member in enumerate(members["params"])
        if member is weight
    )
    optimizer.init_state(optimizer.param_groups[group], weight, group, index)
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)  # a paged state is filled by a kernel, and written by the CPU below
    new = optimizer.state[weight]
    new["step"] = old["step"]
    for number, change in (("1", first), ("2", second)):
        state, into = old[f"state{number}"].to(weight.device), new[f"state{number}"]
        if state.dtype == torch.uint8:
            state = bnb.dequantize_blockwise(
                state, absmax=old[f"absmax{number}"], code=old[f"qmap{number}"], blocksize=_BLOCK
            )
        moment = change(state).contiguous()
        if into.dtype == torch.uint8:
            moment, scales = bnb.quantize_blockwise(moment, code=new[f"qmap{number}"], blocksize=_BLOCK)
            new[f"absmax{number}"].copy_(scales.absmax)
        into.copy_(moment)
    gone = {id(old["state1"]), id(old["state2"])}
    optimizer.page_mng.paged_tensors = [one for one in optimizer.page_mng.paged_tensors if id(one) not in gone]
