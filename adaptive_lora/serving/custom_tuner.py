"""Custom tuners: bottleneck adapters, and trained weights of the base itself.

They are saved as `trained*.safetensors`, with the trained tensors alone, and `family.json`, with their
places in the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .safety import FAMILY, UnsafeFiles, read_json

WEIGHTS = "trained{suffix}.safetensors"
_INSIDE = "bottleneck"


class Bottleneck(nn.Module):
    """h + f(h·W_down + b_down)·W_up + b_up (Houlsby et al. 2019, 1902.00751, section 2.1)."""

    def __init__(self, features: int, width: int, nonlinearity: str) -> None:
        """Make the adapter with W_up and b_up at zero, so that it computes the identity."""
        super().__init__()
        self.down = nn.Linear(features, width)
        self.nonlinearity = ACT2FN[nonlinearity]
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden state with the adapter's change."""
        changed: torch.Tensor = hidden + self.up(self.nonlinearity(self.down(hidden)))
        return changed


class AdaptedModel(nn.Module):
    """A base with bottlenecks in it and some of its own weights trained; used like the base."""

    def __init__(
        self,
        base: Any,
        *,
        trained: Iterable[str] = (),
        bottlenecks: Mapping[str, int] | None = None,
        nonlinearity: str = "gelu",
    ) -> None:
        """Change a base in place; `release` restores it bit for bit.

        Args:
            base: transformers model; its parameters are frozen, and its own tensors are kept.
            trained: names of the parameters to train, as float32 copies.
            bottlenecks: name of a linear layer -> width of the adapter after its output.
            nonlinearity: name of f in transformers.
        """
        super().__init__()
        self._dtype = base.dtype
        self.base = base
        self._handles = []
        self._originals: dict[str, torch.Tensor] = {}
        self._places = tuple(bottlenecks or ())
        for name, width in (bottlenecks or {}).items():
            module = base.get_submodule(name)
            adapter = Bottleneck(_out_features(module), width, nonlinearity)
            module.add_module(_INSIDE, adapter.to(next(module.parameters()).device))
            self._handles.append(module.register_forward_hook(_after))
        chosen = list(trained)
        # On a CPU layer norms do not support mixed types, and trained layers may output float32.
        mixed = _layer_norms(base) if chosen and self._is_low else []
        for name in dict.fromkeys([*chosen, *mixed]):
            parameter = base.get_parameter(name)
            self._originals[name] = parameter.data
            parameter.data = parameter.data.float().clone()
        for name in chosen:
            base.get_parameter(name).requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base; under a low precision, float32 weights are used through autocast."""
        with self._autocast():
            return self.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base."""
        with self._autocast():
            return self.base.generate(*args, **kwargs)

    def get_base_model(self) -> Any:
        """Return the base in its present state."""
        return self.base

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        device: torch.device = self.base.device
        return device

    @property
    def config(self) -> Any:
        """Configuration of the base."""
        return self.base.config

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by their names in the base."""
        return {name: parameter.detach() for name, parameter in self.base.named_parameters() if parameter.requires_grad}

    def start_state(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors before training.

        Tensors of the base are its originals, in their type, not further copies.
        """
        return {
            name: self._originals[name] if name in self._originals else tensor.cpu().clone()
            for name, tensor in self.trained_state().items()
        }

    def release(self) -> None:
        """Remove all changes from the base."""
        for handle in self._handles:
            handle.remove()
        for name in self._places:
            delattr(self.base.get_submodule(name), _INSIDE)
        for name, original in self._originals.items():
            parameter = self.base.get_parameter(name)
            parameter.grad = None
            parameter.requires_grad_(False)
            parameter.data = original.to(parameter.device)
        self._handles, self._places, self._originals = [], (), {}

    def merge_and_unload(self, *, safe_merge: bool = True) -> Any:
        """Return the base with its trained weights in its own type.

        Raises:
            ValueError: there are bottlenecks, whose nonlinearity cannot be merged into a weight.
        """
        if self._places:
            raise ValueError("bottleneck adapters have a nonlinearity: they cannot be merged into a weight")
        for name in self._originals:
            parameter = self.base.get_parameter(name)
            parameter.data = parameter.data.to(self._dtype)
        return self.base

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self._dtype if self._is_low else torch.bfloat16
        return torch.autocast(self.device.type, dtype=kind, enabled=self._is_low)

    @property
    def _is_low(self) -> bool:
        return self._dtype in (torch.bfloat16, torch.float16)


def load_custom_tuner(base: Any, folder: Path) -> AdaptedModel:
    """Load a saved adapter of a custom tuner onto its base.

    Raises:
        ValueError: the weights are not those named in `family.json`.
        UnsafeFiles: they are not finite, or the file is corrupt.
    """
    from safetensors.torch import load_file

    for parameter in base.parameters():
        parameter.requires_grad_(False)
    settings = read_json(folder / FAMILY)
    model = AdaptedModel(
        base, trained=settings["trained"], bottlenecks=settings["bottlenecks"], nonlinearity=settings["nonlinearity"]
    )
    saved: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("trained*.safetensors")):
        saved.update(load_file(path))
    wanted = model.trained_state()
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())
        raise ValueError(f"{folder}: weights and {FAMILY} differ in {len(odd)} names, as {odd[0]}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if not torch.isfinite(saved[name]).all():
                raise UnsafeFiles(f"{folder}: {name} holds NaN or infinity")
            tensor.copy_(saved[name])
    return model


def _after(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    adapter: Any = getattr(module, _INSIDE)
    changed: torch.Tensor = adapter(output)
    return changed


def _layer_norms(base: nn.Module) -> list[str]:
    return [
        f"{name}.{own}"
        for name, module in base.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    ]


def _out_features(module: nn.Module) -> int:
    """Return the output size of a linear layer; GPT-2's Conv1D stores weights as (in, out)."""
    features: int = module.out_features if isinstance(module, nn.Linear) else module.nf  # type: ignore[assignment]
    return features
