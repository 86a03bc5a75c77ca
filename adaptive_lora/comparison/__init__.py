"""Trials to verdicts: does a method beat the baseline, by how much, and how sure is that?"""

from adaptive_lora.comparison.compare import compare
from adaptive_lora.comparison.types import (
    Comparison,
    Difference,
    Failure,
    Margin,
    MethodSummary,
    Parameters,
    Spread,
    Verdict,
    VerdictKind,
)

__all__ = [
    "Comparison",
    "Difference",
    "Failure",
    "Margin",
    "MethodSummary",
    "Parameters",
    "Spread",
    "Verdict",
    "VerdictKind",
    "compare",
]
