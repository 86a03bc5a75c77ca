"""Float32 matrix products on a CPU, by oneDNN, which comes with torch.

torch's own products go to MKL. Measured on a CPU of AMD's (Zen 4, 2 cores), MKL does 70 to 200
GFLOP/s by shape and oneDNN 180 to 215. oneDNN prepares each new shape for about half a millisecond,
so small products stay with MKL. The operator is the one that torch's compiler emits; where it is
missing, all products stay.
"""

from __future__ import annotations

import platform

import torch
from torch.nn import functional

_LEAST = 2**26
"""FLOPs from which a product pays for preparing its shape."""


def _onednn() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):  # measured nowhere else
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HERE = _onednn()


def compute_type(inputs: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the type in which inputs meet a weight: autocast's if it is on, else its own."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x Wᵀ + b, (n, out) from (n, in), as `functional.linear` does, without a gradient.

    Args:
        inputs: (n, in); may be a transposed view.
        weight: (out, in); may be a transposed view.
        bias: (out,) or none.
    """
    if not _suits(inputs, weight):
        return functional.linear(inputs, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found


def _suits(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a product is one of float32 matrices on a CPU, and large."""
    if not _HERE or torch.is_autocast_enabled("cpu"):
        return False
    whole = inputs.dtype == weight.dtype == torch.float32
    on_cpu = inputs.device.type == weight.device.type == "cpu"
    return whole and on_cpu and 2 * inputs.numel() * len(weight) >= _LEAST
