"""Families that PEFT does not have: bottleneck adapters and weights of the base itself."""

from __future__ import annotations

from adaptive_lora.methods.audit_tuner import audit_tuner, audit_tuner_moved
from adaptive_lora.methods.custom_tuner import attach_custom_tuner
from adaptive_lora.serving.custom_tuner import AdaptedModel
from adaptive_lora.study.recipes.trial_context import TrainedTrial, TrialContext


def custom_tuner(job: TrialContext) -> TrainedTrial:
    """Make the planned tensors trainable, train them, done."""
    plan = job.family_plan
    adapted = job.adopt(
        attach_custom_tuner(job.base, plan, seed=job.trial.seed, head=job.head), undo=AdaptedModel.release
    )
    audit_tuner(adapted, plan.tensors, job.head)
    start = adapted.start_state()
    result = job.train(adapted)
    still = audit_tuner_moved(adapted, start, must_move=lambda name: name.endswith("bottleneck.up.weight"))
    return TrainedTrial(
        model=adapted,
        plan=plan,
        result=result,
        training_parameters=plan.trainable_parameters,
        extra={"unmoved_tensors": float(still)},
    )
