"""The methods by name. To add one, write its options class beside it and a line here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from adaptive_lora.allocation.dynamic import AdaLora
from adaptive_lora.allocation.heuristics import AttentionHeavy, LinearDecay, ThreeBand, Uniform
from adaptive_lora.allocation.measured import Empirical
from adaptive_lora.allocation.truncated import Truncate, TruncateRetrain

METHODS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "uniform": Uniform,
        "linear_decay": LinearDecay,
        "attention_heavy": AttentionHeavy,
        "three_band": ThreeBand,
        "empirical": Empirical,
        "adalora": AdaLora,
        "truncate": Truncate,
        "truncate_retrain": TruncateRetrain,
    }
)
"""Name on the command line and in study files -> options class of the allocator."""
