"""Trials to verdicts: does a method beat the baseline, by how much, and how sure is that?"""

from adaptive_lora.analysis.comparison.compare import compare
from adaptive_lora.analysis.comparison.findings import (
    Agreement,
    AgreementKind,
    AuditKind,
    Cost,
    EarlyRate,
    FrontArea,
    ParetoPoint,
    PowerAnswer,
)
from adaptive_lora.analysis.comparison.outcome import Outcome
from adaptive_lora.analysis.comparison.tasks import Task, compare_tasks
from adaptive_lora.analysis.comparison.types import (
    Comparison,
    Difference,
    MethodSummary,
    Parameters,
    SeedMean,
    TaskResult,
    Verdict,
    VerdictKind,
)

__all__ = [
    "Agreement", "AgreementKind", "AuditKind", "Comparison", "Cost", "Difference", "EarlyRate", "FrontArea",
    "MethodSummary", "Outcome", "Parameters", "ParetoPoint", "PowerAnswer", "SeedMean", "Task", "TaskResult", "Verdict",
    "VerdictKind", "compare", "compare_tasks",
]  # fmt: skip
