"""The records of one trial in the tracking store: settings, steps, outcome, failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from adaptive_lora.allocation import RankPlan
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrackingConfig, TrialSpec, digest
from adaptive_lora.errors import AdaptiveLoraError
from adaptive_lora.results import EvalResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.provenance import commit, packages
from adaptive_lora.runner.retained import retained_metrics, with_base_scores
from adaptive_lora.tracking import DataId, Recorder
from adaptive_lora.tracking.runs import HISTORY, PLAN, RESULT, SIGNATURE, TOKENS, record_retained, result_to_dict
from adaptive_lora.training import StepEvent

if TYPE_CHECKING:
    from adaptive_lora.runner.trial import TrialOutcome

_OF_MODEL = ("validation/final_loss", "trainable_parameters")
"""Metrics of the logged model, besides its test scores."""


_OF_A_STUDY = ("methods", "seeds", "lr", "retain_data", "max_forgetting", "max_forgetting_percent")
"""Settings that a trial has one value of, or that its training does not depend on."""


def trial_tags(context: StudyContext, trial: TrialSpec) -> dict[str, str]:
    """Return the tags of a trial's run, including its signature."""
    return {
        "method": trial.method.label,
        "seed": str(trial.seed),
        "fold": str(trial.fold),
        "lr": repr(trial.lr),
        SIGNATURE: context.signature(trial),
        "precision": context.runtime.precision,
        "device": str(context.runtime.device),
        "data_digest": context.data.digest,
        TOKENS: context.tokens_digest,
        "base_hash": context.base.reference.content_hash,
        **({"plugins": " ".join(plugins)} if (plugins := trial.method.packages) else {}),
        **({} if trial.method.base == BaseStorage.FULL else {"quantisation": trial.method.base}),
        "task": context.task.name,
        "code_version": commit(),
        "packages": packages(),
    }


def log_settings(context: StudyContext, run: Recorder, trial: TrialSpec) -> None:
    """Log the settings, numbers of threads and processes, and data of a trial that begins or continues."""
    run.params(trial_parameters(context, trial))
    count = context.runtime.processes.count
    run.tags({"threads": str(torch.get_num_threads()), **({"processes": str(count)} if count > 1 else {})})
    splits = context.splits(trial.fold)
    run.data(context.data.source, context.data.digest, context.config.data.data, len(splits.train))


def trial_parameters(context: StudyContext, trial: TrialSpec) -> Mapping[str, Any]:
    """Return the settings of a trial, and the sizes of its data."""
    places = {field.name for field in dataclasses.fields(TrackingConfig)}
    kept = {"experiment", "registered_model"}
    shared = {
        f"cfg.{key}": value
        for key, value in trial.config.flat().items()
        if key not in _OF_A_STUDY and (key not in places or key in kept)
    }
    method = {f"method.{key}": value for key, value in trial.method.to_dict().items()}
    splits = context.splits(trial.fold)
    tokens = sum(example.supervised_tokens for example in splits.train)
    return {
        **shared,
        **method,
        "trial.lr": repr(trial.lr),
        "trial.seed": trial.seed,
        "trial.fold": trial.fold,
        "data.train_examples": len(splits.train),
        "data.validation_examples": len(splits.validation),
        "data.train_supervised_tokens": tokens,
        **context.data_summary.parameters(),
        "model.dtype": str(context.runtime.base_dtype),
        "model.adapter_dtype": "torch.float32",
    }


def log_step(run: Recorder, event: StepEvent) -> None:
    """Record metrics; at validations, send them in the background."""
    run.metric("train/loss", event.loss, event.step)
    run.metric("train/tokens", event.tokens, event.step)  # an x-axis for the other metrics
    if event.validation_loss is not None:
        run.metric("validation/loss", event.validation_loss, event.step)
        run.flush()


@contextmanager
def failure_logged(run: Recorder) -> Iterator[None]:
    """Log the message of an error that ends the block."""
    try:
        yield
    except AdaptiveLoraError as failure:
        run.flush()
        run.tags({"failure": str(failure)[:5000]})
        raise


def log_outcome(context: StudyContext, run: Recorder, trial: TrialSpec, outcome: TrialOutcome) -> None:
    """Log the adapter, results, plan and metrics of a finished trial."""
    metadata = {
        "method": trial.method.label,
        "base": context.base.reference.name,
        "base_hash": context.base.reference.content_hash,
        "test_loss": outcome.test.loss,
    }
    tested = log_test_data(context, run, outcome.test)
    run.model(
        outcome.folder,
        metadata,
        name=trial.label,
        params={
            "method": trial.method.label,
            **({} if outcome.plan.budget is None else {"budget": outcome.plan.budget}),
            "lr": repr(trial.lr),
            "seed": trial.seed,
            "fold": trial.fold,
            "base": context.base.reference.name,
            "task": context.task.name,
        },
        tags={SIGNATURE: context.signature(trial)},
    )
    run.tags({"order_digest": outcome.train.order_digest})
    run.json(RESULT, result_to_dict(outcome.train, outcome.test))
    run.json(PLAN, outcome.plan.to_dict())
    if outcome.history:
        run.json(HISTORY, [dataclasses.asdict(event) for event in outcome.history])
        for event in outcome.history:
            run.metric("ranks/total", sum(event.ranks.values()), event.step)
    if outcome.profile is not None:
        run.json(f"profile_{outcome.profile.metric}.json", outcome.profile.to_dict())
    retained = with_base_scores(context, outcome.retained)
    record_retained(run, retained)
    for key, value in {**trial_metrics(context, outcome, trial.fold), **retained_metrics(retained)}.items():
        if key.startswith("test/"):
            run.metric(key, value, of_model=True, data=tested)
        else:
            run.metric(key, value, of_model=key in _OF_MODEL or key.startswith("retained/"))
    run.flush()


def log_test_data(context: StudyContext, run: Recorder, test: EvalResult) -> DataId:
    """Log the test split that was scored as an input; an example's id is a digest of its content."""
    data, ids = context.config.data, list(test.example_ids)
    tested = DataId(f"{context.data.source}·test", digest({"examples": ids}))
    run.data(*tested, data.test_data or data.data, len(ids), context="test")
    return tested


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
        if outcome.profile.visible is not None:
            metrics["profile/covering_rank"] = float(outcome.profile.visible.whole.rank)
        metrics["profile/share_of_training"] = outcome.profile.seconds / train.seconds
    if isinstance(plan, RankPlan) and plan.certificate is not None:
        metrics["plan/headroom"] = plan.certificate.headroom
        metrics["plan/abstained"] = float(plan.certificate.abstained)
    return metrics
