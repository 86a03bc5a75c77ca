"""PEFT's adapter types: the option that sets a type's size, its values, and why some types are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from adaptive_lora.plugins import PluginTable, checked
from adaptive_lora.serving.other_types import GROUP


class Values(StrEnum):
    """Values that a size option can take."""

    WHOLE = "whole"
    """Whole numbers from 1."""
    BLOCKS = "blocks"
    """Block sizes: common divisors of the sites' features."""
    SHARE = "share"
    """Numbers between 0 and 1."""
    VARIANTS = "variants"
    """Names, in rising order of size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftType:
    """A type of adapter of PEFT that has a part at every site."""

    size: str = ""
    """Option of its configuration that sets its number of parameters; empty: none does."""
    values: Values = Values.WHOLE
    pattern: str = ""
    """Option of its configuration with a size per site; empty: all sites have the same."""
    multiple_of: str = ""
    """Option whose value divides the size; empty: none."""
    at_least: str = ""
    """Option whose value the size must reach, where PEFT builds smaller ones but does not run them; empty: none."""
    step: int = 1
    """Step between sizes where that option is not given."""
    variants: tuple[str, ...] = ()
    """Values of the size option, where these are names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of its configuration that differ from PEFT's defaults."""
    packed: bool = False
    """Support of a base in 4 bit; the other types take its bytes for weights, or add to its outputs in place."""
    config_class: Any = None
    """Its `peft.PeftConfig`, where PEFT does not have the type."""
    tuner_class: Any = None
    """Its `peft.tuners.tuners_utils.BaseTuner`, where PEFT does not have the type."""


_OWN_TYPES: Mapping[str, PeftType] = MappingProxyType(
    {
        "BEFT": PeftType(packed=True),
        "BOFT": PeftType(size="boft_block_size", values=Values.BLOCKS, packed=True),
        "C3A": PeftType(size="block_size", values=Values.BLOCKS, pattern="block_size_pattern"),
        "DEFT": PeftType(size="r"),
        "DELORA": PeftType(size="r", pattern="rank_pattern"),
        "FOURIERFT": PeftType(size="n_frequency", pattern="n_frequency_pattern", packed=True),
        "FROD": PeftType(size="sparse_rate", values=Values.SHARE, settings={"progressbar": False}),
        "GLORA": PeftType(size="r"),
        "GRALORA": PeftType(size="r", multiple_of="gralora_k", step=2),
        "HIRA": PeftType(
            size="r", packed=True
        ),  # PEFT 0.21.2 builds the sites of its rank_pattern with the common rank
        "HRA": PeftType(size="r", step=2),  # reflections cancel in pairs at the start
        "LILY": PeftType(size="r", packed=True),
        "LOHA": PeftType(size="r", pattern="rank_pattern"),
        "LOKR": PeftType(size="r", pattern="rank_pattern"),
        "MISS": PeftType(size="r", packed=True),
        "OFT": PeftType(size="oft_block_size", values=Values.BLOCKS, packed=True),
        "OSF": PeftType(size="effective_rank", pattern="rank_pattern"),
        "PEANUT": PeftType(size="r"),
        "PSOFT": PeftType(size="r"),
        "PVERA": PeftType(size="r", packed=True),
        "RANDLORA": PeftType(size="r", packed=True),
        "ROAD": PeftType(size="variant", values=Values.VARIANTS, variants=("road_1", "road_2", "road_4"), packed=True),
        "SHIRA": PeftType(size="r", packed=True),
        "SUPERTUNING": PeftType(size="sparsity", values=Values.SHARE),
        "TINYLORA": PeftType(size="u"),
        "UNILORA": PeftType(size="theta_d_length"),
        "VBLORA": PeftType(size="num_vectors", at_least="topk", packed=True),
        "VERA": PeftType(size="r", packed=True),
        "WAVEFT": PeftType(size="n_frequency", pattern="n_frequency_pattern", packed=True),
    }
)


def _problem(found: Any) -> str | None:
    """Return why the object of an entry point is no type of adapter, or None."""
    if not isinstance(found, PeftType) or found.config_class is None or found.tuner_class is None:
        return f"required a PeftType with config_class and tuner_class, got {found!r:.80}"
    return None


TYPES: PluginTable[PeftType] = PluginTable(_OWN_TYPES, GROUP, checked(_problem))
"""Name of a type, for PEFT's own the value of its `PeftType` -> facts about it."""

_OWN = "the method {} trains it"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "ADALORA": _OWN.format("adalora"),
        "IA3": _OWN.format("ia3"),
        "LN_TUNING": _OWN.format("ln_tuning"),
        "LORA": "every method with ranks trains it, such as uniform",
        "P_TUNING": _OWN.format("p_tuning"),
        "PREFIX_TUNING": _OWN.format("prefix_tuning"),
        "PROMPT_TUNING": _OWN.format("prompt_tuning"),
        "ADAMSS": "its number of parameters depends on the base's weights, so that it cannot be planned",
        "ADAPTION_PROMPT": "it changes whole attention modules of a few architectures, not sites",
        "CARTRIDGE": "it compresses one document into a cache, and has no training rows",
        "CPT": "its prompt is part of the training examples, which are written for it",
        "MULTITASK_PROMPT_TUNING": "it takes a task id with every example, which a study of one task has not",
        "POLY": "it takes a task id with every example, which a study of one task has not",
        "SHADOW": "it trains a second model beside the base, not a part at every site",
        "TRAINABLE_TOKENS": "it trains rows of the embeddings, and needs the ids of added tokens",
        "XLORA": "it mixes adapters that are trained before",
    }
)
"""Value of PEFT's `PeftType` that `peft:type=` does not take -> the reason."""
