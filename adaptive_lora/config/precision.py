"""Precisions in which trials compute, with all that depends on them."""

from __future__ import annotations

from enum import StrEnum


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
