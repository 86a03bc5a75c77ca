"""The methods by name. To add one, write its options class beside it and a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adaptive_lora.allocation.bottleneck import Houlsby, Pfeiffer
from adaptive_lora.allocation.controls import Inverse, LrOnly, Random
from adaptive_lora.allocation.dynamic import AdaLora, GrowPrune
from adaptive_lora.allocation.families import FamilyUniform
from adaptive_lora.allocation.heuristics import AttentionHeavy, LinearDecay, ThreeBand, Uniform
from adaptive_lora.allocation.initialised import Eva, Gora
from adaptive_lora.allocation.measured import Empirical, Proportional
from adaptive_lora.allocation.rescaled import Ia3
from adaptive_lora.allocation.selected import BitFit, FullFineTuning, HeadOnly, LnTuning
from adaptive_lora.allocation.soft_prompts import PrefixTuning, PromptTuning, PTuning
from adaptive_lora.allocation.truncated import Truncate, TruncateRetrain
from adaptive_lora.allocation.waterfill import Waterfill
from adaptive_lora.plugins import PluginTable, checked

_OWN: Mapping[str, Any] = MappingProxyType(
    {
        "uniform": Uniform,
        "linear_decay": LinearDecay,
        "attention_heavy": AttentionHeavy,
        "three_band": ThreeBand,
        "empirical": Empirical,
        "proportional": Proportional,
        "waterfill": Waterfill,
        "random": Random,
        "inverse": Inverse,
        "family_uniform": FamilyUniform,
        "lr_only": LrOnly,
        "adalora": AdaLora,
        "grow_prune": GrowPrune,
        "eva": Eva,
        "gora": Gora,
        "truncate": Truncate,
        "truncate_retrain": TruncateRetrain,
        "prompt_tuning": PromptTuning,
        "prefix_tuning": PrefixTuning,
        "p_tuning": PTuning,
        "ia3": Ia3,
        "houlsby": Houlsby,
        "pfeiffer": Pfeiffer,
        "full": FullFineTuning,
        "bitfit": BitFit,
        "ln_tuning": LnTuning,
        "head_only": HeadOnly,
    }
)


def _problem(kind: Any) -> str | None:
    """Return why something is no options class of a method, or None."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return f"required a frozen dataclass of options, got {kind!r}"
    missing = [name for name in ("metric", "rank_label") if not hasattr(kind(), name)]
    if not any(hasattr(kind, name) for name in ("demand", "solve", "design")):
        missing.append("demand, solve or design")
    return f"{kind.__name__} has no {', '.join(missing)}" if missing else None


METHODS: PluginTable[Any] = PluginTable(_OWN, "adaptive_lora.methods", checked(_problem))
"""Name on the command line and in study files -> options class of the allocator or family."""
