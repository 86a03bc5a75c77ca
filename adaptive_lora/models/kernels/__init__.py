"""Fast implementations of training and scoring, each tested to be equal to the plain one."""

from adaptive_lora.models.kernels.attention import attends_packed, packed_attention
from adaptive_lora.models.kernels.causal import PackedScores, packed_nll, packed_scores, supervised
from adaptive_lora.models.kernels.check import (
    causality_problem,
    has_prompt,
    is_invoked,
    packing_problem,
    padding_problem,
)
from adaptive_lora.models.kernels.cross_entropy import Head, token_nll
from adaptive_lora.models.kernels.lora import fast_layers

__all__ = [
    "Head",
    "PackedScores",
    "attends_packed",
    "causality_problem",
    "fast_layers",
    "has_prompt",
    "is_invoked",
    "packed_attention",
    "packed_nll",
    "packed_scores",
    "packing_problem",
    "padding_problem",
    "supervised",
    "token_nll",
]
