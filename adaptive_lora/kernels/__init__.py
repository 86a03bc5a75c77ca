"""Fast paths of training and scoring, each equal to the plain one and tested against it."""

from adaptive_lora.kernels.attention import packed_attention
from adaptive_lora.kernels.causal import PackedScores, packed_nll, packed_scores, supervised
from adaptive_lora.kernels.check import packing_problem
from adaptive_lora.kernels.cross_entropy import Head, token_nll

__all__ = [
    "Head",
    "PackedScores",
    "packed_attention",
    "packed_nll",
    "packed_scores",
    "packing_problem",
    "supervised",
    "token_nll",
]
