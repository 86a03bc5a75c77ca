"""Families that PEFT has beside LoRA: soft prompts and IA3."""

from __future__ import annotations

from adaptive_lora.methods.audit_tuner import audit_tuner, audit_tuner_moved, trained_tensors
from adaptive_lora.methods.peft_tuner import attach_peft_tuner, detach_peft_tuner, keep_the_embeddings
from adaptive_lora.study.recipes.trial_context import TrainedTrial, TrialContext


def peft_tuner(job: TrialContext) -> TrainedTrial:
    """Attach, train, and keep of P-tuning's encoder what it wrote."""
    plan = job.family_plan
    adapted = job.adopt(attach_peft_tuner(job.base, plan, seed=job.trial.seed, head=job.head), undo=detach_peft_tuner)
    audit_tuner(adapted, plan.tensors, job.head)
    start = {name: p.detach().cpu().clone() for name, p in trained_tensors(adapted).items()}
    result = job.train(adapted)
    audit_tuner_moved(adapted, start, must_move=lambda name: True)
    if plan.kept is not None:
        keep_the_embeddings(adapted)
    return TrainedTrial(model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters)
