"""Types of settings: precisions with all that depends on them, and memory sizes as text."""

from __future__ import annotations

import re
from enum import StrEnum

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


class Precision(StrEnum):
    """Compute type; trainable weights stay float32 in all."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> str:
        """Torch's name of the type that the base's weights have."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self]

    @classmethod
    def of_dtype(cls, dtype: str) -> Precision:
        """Return the precision whose base has weights of a type, by torch's name."""
        return next(precision for precision in cls if precision.dtype == dtype)

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight of the base and of an activation."""
        return 4 if self is Precision.FP32 else 2

    @property
    def mixed_precision(self) -> str:
        """Accelerate's name of it."""
        return "no" if self is Precision.FP32 else str(self)

    @property
    def rounding(self) -> float:
        """Relative distance of two neighbouring numbers; 0 where results must be equal bit for bit."""
        return {"fp32": 0.0, "bf16": 2.0**-7, "fp16": 2.0**-10}[self]

    @property
    def description(self) -> str:
        """Words of a methods section."""
        kinds = {"fp32": "", "bf16": " autocast", "fp16": " autocast with a gradient scaler"}
        return f"{self.dtype}{kinds[self]}"


class MemorySize(int):
    """Bytes, read from a number or a text such as 6GiB, 500 MB or 8g (1 GB is 1,000 MB)."""

    def __new__(cls, value: object) -> MemorySize:
        """Read a size.

        Raises:
            ValueError: the text is not a size.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if not found or isinstance(value, bool):
            raise ValueError(f"expected a size such as 6GiB or 800MB, got {value!r}")
        number, unit = found.groups()
        return super().__new__(cls, float(number) * _UNITS[unit or ""])


def shown(count: float) -> str:
    """Return a number of bytes as text, such as `6.43 GiB`."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if count >= _UNITS[unit.lower()]:
            return f"{count / _UNITS[unit.lower()]:.3g} {unit}B"
    return f"{count:.0f} B"
