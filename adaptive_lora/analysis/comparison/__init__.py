"""Trials to verdicts: does a method beat the baseline, by how much, and how sure is that?"""

from adaptive_lora.analysis.comparison.compare import compare
from adaptive_lora.analysis.comparison.findings import (
    Agreement,
    AgreementKind,
    AuditEntry,
    AuditKind,
    BudgetMap,
    Cost,
    EarlyRate,
    FrontArea,
    ParetoFront,
    ParetoPoint,
    PowerAnswer,
)
from adaptive_lora.analysis.comparison.types import (
    Comparison,
    Difference,
    Failure,
    Margin,
    MethodSummary,
    Parameters,
    SeedMean,
    Verdict,
    VerdictKind,
)

__all__ = [
    "Agreement", "AgreementKind", "AuditEntry", "AuditKind", "BudgetMap", "Comparison", "Cost", "Difference",
    "EarlyRate", "Failure", "FrontArea", "Margin", "MethodSummary", "Parameters", "ParetoFront",
    "ParetoPoint", "PowerAnswer", "SeedMean", "Verdict", "VerdictKind", "compare",
]  # fmt: skip
