"""The run of one trial: training by its method, audit, scoring, saving."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaptive_lora.allocation import Plan, RankPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrialSpec
from adaptive_lora.errors import TrialFailed
from adaptive_lora.methods.adapters import audit_as_built, save_adapter
from adaptive_lora.methods.base import RankEvent, TrainedTrial
from adaptive_lora.methods.importance import ImportanceProfile
from adaptive_lora.models.errors import model_errors
from adaptive_lora.results import EvalResult, TrainResult
from adaptive_lora.study.context import StudyContext
from adaptive_lora.study.trial_context import TrialOnBase
from adaptive_lora.training import StepEvent, TrialCheckpoints

PROBE = "probe.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOutcome:
    """Results of a finished trial."""

    plan: Plan
    """Plan of the adapter as built and saved."""
    profile: ImportanceProfile | None
    train: TrainResult
    test: EvalResult
    folder: Path
    """Folder of the adapter."""
    seconds: float
    """Wall time in seconds of the whole trial, without the time of other trials."""
    training_parameters: int
    """Maximum number of parameters trained at the same time; above the plan's if ranks were pruned."""
    history: tuple[RankEvent, ...]
    """Ranks during training, if they changed."""
    search_seconds: float
    """Wall time in seconds spent on finding ranks and initial weights."""
    trainings: int
    """Number of trainings; more than one if the first only finds ranks."""
    extra: dict[str, float]
    """Further metrics of the method."""


def run_trial(
    context: StudyContext,
    trial: TrialSpec,
    folder: Path,
    on_step: Callable[[StepEvent], None] = lambda event: None,
    checkpoints: TrialCheckpoints | None = None,
) -> TrialOutcome:
    """Run a trial on the shared base, which has no adapters afterwards.

    Args:
        context: base, data and plans.
        trial: trial to run.
        folder: folder for the adapter.
        on_step: function called after every optimiser step.
        checkpoints: checkpoints of this trial, from which it continues; None: it cannot be resumed.

    Raises:
        TrialFailed: training was not stable.
        AdapterError: the model as built differs from the plan, or a site was not changed by training.
        ModelError: a library raised while the trial was attached, trained or scored.
    """
    started = time.perf_counter()
    context = context.on_base(trial.method.base)
    metric = trial.method.options.metric
    trial_context = TrialOnBase(context, trial, on_step, checkpoints)
    try:
        with model_errors(f"{trial.label} on {context.architecture.kind} failed", context.base.model):
            trained = trial.method.options.fit(trial_context)
            _require_finite("validation", trained.result.validation_loss)
            audit_as_built(trained.model, trained.plan, trial_context.head)
            test = context.score(trained.model, context.splits(trial.fold).test)
            _require_finite("test", test.loss)
            test = dataclasses.replace(test, overall={**test.overall, **context.task.plan_scores(trained.plan)})
            _save(context, trial, trained, folder)
    finally:
        trial_context.release()
    before = 0.0 if checkpoints is None else checkpoints.seconds_before
    return TrialOutcome(
        plan=trained.plan,
        profile=None if metric is None else context.profile(metric, seed=trial.seed, fold=trial.fold),
        train=trained.result,
        test=test,
        folder=folder,
        seconds=before + time.perf_counter() - started - trained.result.waited_seconds,
        training_parameters=trained.training_parameters,
        history=trained.history,
        search_seconds=trained.search_seconds,
        trainings=trial_context.trainings,
        extra=trained.extra,
    )


def _require_finite(part: str, loss: float) -> None:
    """Raise TrialFailed for a non-finite loss; the guard does not check the weights after the last step."""
    if not math.isfinite(loss):
        raise TrialFailed(
            f"{part} loss is {loss:g} after training. Lower the learning rate or use precision bf16 or fp32."
        )


def _save(context: StudyContext, trial: TrialSpec, trained: TrainedTrial, folder: Path) -> None:
    save_adapter(
        trained.model,
        folder,
        plan=trained.plan,
        base=context.base.reference,
        dtype=str(context.runtime.base_dtype).removeprefix("torch."),
        template=context.data.template,
        task=context.task.served,
        quantisation=context.base.quantisation,
    )
    save_file({"logits": probe_logits(context, trained.model, trial.fold)}, folder / PROBE)


def probe_logits(context: StudyContext, model: Any, fold: int) -> torch.Tensor:
    """Return the task's outputs for the first test examples, shape (up to 4, ...), float32.

    The reloaded adapter must give equal outputs.
    """
    return context.task.probe(model, context.splits(fold).test)


def trial_metrics(context: StudyContext, outcome: TrialOutcome, fold: int) -> dict[str, float]:
    """Return the metrics of a finished trial under their stable names.

    `efficiency_ratio` is (base loss - test loss) / (trainable parameters / 10^6): the gain in nats per
    supervised token per million trainable parameters. The published study (its
    `analyze_results.py`, `perplexity_per_param`) divides perplexity by millions of parameters, a
    figure that improves when a method spends more; the gain over the frozen base does not.
    `reduction_vs_full` is 1 - trainable / all parameters of the base. `trainable_parameters` are
    those of the final adapter, `training_parameters` the most trained at the same time, neither
    with `head_parameters`, which every method of a task trains in addition.
    """
    train, test, plan = outcome.train, outcome.test, outcome.plan
    gained = context.base_scores(fold).loss - test.loss
    metrics = {
        "validation/final_loss": train.validation_loss,
        **{f"test/{name}": value for name, value in context.task.metrics(test).items()},
        "trainable_parameters": float(plan.trainable_parameters),
        "training_parameters": float(outcome.training_parameters),
        "head_parameters": float(context.base.head_parameters),
        "total_parameters": float(context.base.total_parameters),
        "reduction_vs_full": 1 - plan.trainable_parameters / context.base.total_parameters,
        "efficiency_ratio": gained / (plan.trainable_parameters / 1e6),
        "train/supervised_tokens": float(train.supervised_tokens),
        "tokens_per_second": train.tokens / train.seconds,
        "train_seconds": train.seconds,
        "wall_seconds": outcome.seconds,
        "search_seconds": outcome.search_seconds,
        "trainings": float(outcome.trainings),
        "micro_batch": float(train.micro_batch),
        "trials_together": float(train.trials_together),
        "skipped_steps": float(train.skipped_steps),
        "stopped_early": float(train.stopped_early),
        **outcome.extra,
    }
    if train.peak_memory_bytes is not None:
        metrics["peak_memory_bytes"] = float(train.peak_memory_bytes)
    if plan.base != BaseStorage.FULL:
        metrics["base/quantised_loss"] = context.on_base(plan.base).base_scores(fold).loss
    if outcome.profile is not None:
        metrics["profile/seconds"] = outcome.profile.seconds
        metrics["profile/stability"] = outcome.profile.stability
        metrics["profile/share_of_training"] = outcome.profile.seconds / train.seconds
    if isinstance(plan, RankPlan) and plan.certificate is not None:
        metrics["plan/headroom"] = plan.certificate.headroom
        metrics["plan/abstained"] = float(plan.certificate.abstained)
    return metrics
