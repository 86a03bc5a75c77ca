"""Helper of the tests that profile: a profile without the workbench's cache."""

from __future__ import annotations

import dataclasses

from adaptive_lora.methods.importance import ImportanceProfile, profile_importance
from adaptive_lora.runner.context import StudyContext

SITE = "transformer.h.1.mlp.c_fc"
"""A Conv1D site of the test base."""


def profile(context: StudyContext, metric: str, seed: int = 0, **changes: object) -> ImportanceProfile:
    """Measure a profile without the workbench's cache."""
    task = dataclasses.replace(context.profile_task(seed=seed, fold=0), **changes)  # type: ignore[arg-type]
    return profile_importance(task, metric=metric, seed=seed)
