"""Families that PEFT has beside LoRA: soft prompts and IA3."""

from __future__ import annotations

from adaptive_lora.methods.audit_tuner import audit_family, audit_family_moved, trained_tensors
from adaptive_lora.methods.peft_tuner import attach_peft_family, detach_peft_family, keep_the_embeddings
from adaptive_lora.study.recipes.trial_context import Job, Trained


def peft_family(job: Job) -> Trained:
    """Attach, train, and keep of P-tuning's encoder what it wrote."""
    plan = job.family_plan
    adapted = job.adopt(attach_peft_family(job.base, plan, seed=job.trial.seed, head=job.head), undo=detach_peft_family)
    audit_family(adapted, plan.tensors, job.head)
    start = {name: p.detach().cpu().clone() for name, p in trained_tensors(adapted).items()}
    result = job.train(adapted)
    audit_family_moved(adapted, start, must_move=lambda name: True)
    if plan.kept is not None:
        keep_the_embeddings(adapted)
    return Trained(model=adapted, plan=plan, result=result, training_parameters=plan.trainable_parameters)
