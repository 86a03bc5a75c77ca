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
    VerdictKind,
)
from adaptive_lora.analysis.comparison.looks import Look, LookedAt, SeedPlan, first_looks
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
)

__all__ = [
    "Agreement", "AgreementKind", "AuditKind", "Comparison", "Cost", "Difference", "EarlyRate", "FrontArea", "Look",
    "LookedAt", "MethodSummary", "Outcome", "Parameters", "ParetoPoint", "PowerAnswer", "SeedMean", "SeedPlan",
    "Task", "TaskResult", "Verdict", "VerdictKind", "compare", "compare_tasks", "first_looks",
]  # fmt: skip
