"""Float32 matrix products on a CPU by oneDNN, which torch includes.

torch's own products use MKL. Measured on an AMD CPU (Zen 4, 2 cores), MKL reaches 70 to 200 GFLOP/s
by shape and oneDNN 180 to 215. oneDNN prepares each new shape for about half a millisecond, so small
products use MKL. The operator is the one emitted by torch's compiler; if it is missing, all products
use MKL.
"""

from __future__ import annotations

import platform

import torch
from torch.nn import functional

_LEAST = 2**26
"""Minimum FLOPs of a product for which preparing its shape is worthwhile."""


def _onednn() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):  # not measured on other architectures
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HERE = _onednn()


def compute_type(inputs: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the type of the product of inputs and weight: autocast's if active, else the weight's."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x Wᵀ + b, shape (n, out), as `functional.linear` does, without a gradient.

    Args:
        inputs: x, shape (n, in); may be a transposed view.
        weight: W, shape (out, in); may be a transposed view.
        bias: b, shape (out,), or None.
    """
    if not _suits(inputs, weight):
        return functional.linear(inputs, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found


def _suits(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a product is a large one of float32 matrices on a CPU."""
    if not _HERE or torch.is_autocast_enabled("cpu"):
        return False
    whole = inputs.dtype == weight.dtype == torch.float32
    on_cpu = inputs.device.type == weight.device.type == "cpu"
    return whole and on_cpu and 2 * inputs.numel() * len(weight) >= _LEAST
