"""Plain LoRA: the plan is decided before training."""

from __future__ import annotations

from adaptive_lora.methods import audit_moved
from adaptive_lora.study.recipes.trial_context import TrainedTrial, TrialContext


def plain(job: TrialContext) -> TrainedTrial:
    """Attach the plan, train it, done."""
    adapted = job.attach(job.plan)
    result = job.train(adapted)
    audit_moved(adapted)
    return TrainedTrial(model=adapted, plan=job.plan, result=result, training_parameters=job.plan.trainable_parameters)
