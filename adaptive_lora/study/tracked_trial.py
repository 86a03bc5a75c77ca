"""The run of one trial: tracking, and the checkpoints from which it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import TrackingConfig, TrialSpec
from adaptive_lora.errors import AdaptiveLoraError, LeaseLost, TrialFailed
from adaptive_lora.interruption import TrainingPaused
from adaptive_lora.models.threads import shared_cores
from adaptive_lora.redaction import shown
from adaptive_lora.study.context import StudyContext
from adaptive_lora.study.progress import StudyProgress
from adaptive_lora.study.provenance import packages, provenance
from adaptive_lora.study.trial import TrialOutcome, run_trial, trial_metrics
from adaptive_lora.tracking import Recorder, StudyRun
from adaptive_lora.tracking.runs import (
    HISTORY,
    PAUSED,
    PLAN,
    RACE,
    RACE_STEP,
    RESULT,
    SIGNATURE,
    TOKENS,
    result_to_dict,
    run_name,
)
from adaptive_lora.tracking.study_run import TrialStatus
from adaptive_lora.training import Frequency, StepEvent, TrialCheckpoints


def run_tracked(
    context: StudyContext,
    study: StudyRun,
    trial: TrialSpec,
    progress: StudyProgress,
    *,
    adopt: bool = False,
    pause_at: int | None = None,
) -> TrialOutcome | TrialStatus:
    """Run one trial under its own MLflow run, and log its results.

    Args:
        context: context of the study.
        study: parent run of the study.
        trial: trial to run.
        progress: progress display.
        adopt: whether to use the run that `mlflow run` made for this process, if there is one.
        pause_at: optimiser step at which it is paused with a checkpoint; None: it is not paused.

    Returns:
        The outcome, or the trial's status if there is nothing to do for this process.

    Raises:
        TrialFailed: training was not stable.
    """
    name = run_name(trial.label) if adopt else trial.label
    run = study.take(name, _tags(context, trial), adopt=adopt, pause_at=pause_at)
    if isinstance(run, TrialStatus):
        return run
    progress.begin(trial.label)
    checkpoints = trial_checkpoints(context, trial)
    try:
        with study.trial(run) as check:
            way = _Way(progress, check, checkpoints, pause_at)
            with shared_cores():
                outcome = _run_leased(context, run, trial, way)
    except TrainingPaused:
        return TrialStatus.PAUSED
    except LeaseLost as lost:
        progress.note(shown(f"{trial.label}: {lost}"))
        return TrialStatus.TAKEN
    except TrialFailed:
        checkpoints.remove()  # continuing from it would only fail again
        raise
    checkpoints.remove()
    progress.end(trial.label, _summary(outcome))
    return outcome


@dataclass(frozen=True, slots=True)
class _Way:
    """Settings of a trial's run: step callback, checkpoints, and step at which it is paused."""

    progress: StudyProgress
    check_lease: Callable[[], None]
    checkpoints: TrialCheckpoints
    pause_at: int | None


def _run_leased(context: StudyContext, run: Recorder, trial: TrialSpec, way: _Way) -> TrialOutcome:
    """Run a trial leased by this process, and log its results."""
    run.params(_parameters(context, trial))
    run.tags({"threads": str(torch.get_num_threads())})
    splits = context.splits(trial.fold)
    run.data(context.data.source, context.data.digest, context.config.data.data, len(splits.train))

    def on_step(event: StepEvent) -> None:
        way.check_lease()
        way.progress.step(trial.label, event)
        _buffer(run, event)
        if event.step == way.pause_at:
            run.tags({RACE: PAUSED, RACE_STEP: str(event.step)})
            raise TrainingPaused

    try:
        with way.checkpoints.workplace() as folder:
            adapter, kept = folder / "adapter", way.checkpoints
            outcome = run_trial(context, trial, adapter, on_step, kept)
            _log_outcome(context, run, trial, outcome)
    except AdaptiveLoraError as failure:
        run.flush()
        run.tags({"failure": str(failure)[:5000]})
        raise
    return outcome


def _summary(outcome: TrialOutcome) -> str:
    """Return the line shown for a finished trial."""
    test = outcome.test
    exact = "" if test.exact_match is None else f"  exact match {test.exact_match:6.1%}"
    skipped = f"  [red]{outcome.train.skipped_steps} steps skipped[/]" if outcome.train.skipped_steps else ""
    return f"test loss {test.loss:.4f}{exact}  {outcome.seconds:.1f} s{skipped}"


def _tags(context: StudyContext, trial: TrialSpec) -> dict[str, str]:
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
        "code_version": provenance()["commit"],
        "packages": packages(),
    }


def trial_checkpoints(context: StudyContext, trial: TrialSpec) -> TrialCheckpoints:
    """Return a trial's checkpoints, in a folder of its signature inside one of the study."""
    config = context.config.tracking
    home = Path(config.checkpoints or Path(config.output) / "checkpoints")
    return TrialCheckpoints(
        home / context.study_id / context.signature(trial),
        Frequency(minutes=config.checkpoint_minutes, steps=config.checkpoint_steps),
    )


def _parameters(context: StudyContext, trial: TrialSpec) -> Mapping[str, Any]:
    places = {field.name for field in dataclasses.fields(TrackingConfig)}
    kept = {"experiment", "registered_model"}
    shared = {
        f"cfg.{key}": value
        for key, value in trial.config.flat().items()
        if key not in ("methods", "seeds", "lr") and (key not in places or key in kept)
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


def _buffer(run: Recorder, event: StepEvent) -> None:
    """Record metrics; at validations, send them in the background."""
    run.metric("train/loss", event.loss, event.step)
    run.metric("train/tokens", event.tokens, event.step)  # an x-axis for the other metrics
    if event.validation_loss is not None:
        run.metric("validation/loss", event.validation_loss, event.step)
        run.flush()


def _log_outcome(context: StudyContext, run: Recorder, trial: TrialSpec, outcome: TrialOutcome) -> None:
    metadata = {
        "method": trial.method.label,
        "base": context.base.reference.name,
        "base_hash": context.base.reference.content_hash,
        "test_loss": outcome.test.loss,
    }
    run.model(outcome.folder, metadata)
    run.tags({"order_digest": outcome.train.order_digest})
    run.json(RESULT, result_to_dict(outcome.train, outcome.test))
    run.json(PLAN, outcome.plan.to_dict())
    if outcome.history:
        run.json(HISTORY, [dataclasses.asdict(event) for event in outcome.history])
        for event in outcome.history:
            run.metric("ranks/total", sum(event.ranks.values()), event.step)
    if outcome.profile is not None:
        run.json(f"profile_{outcome.profile.metric}.json", outcome.profile.to_dict())
    for key, value in trial_metrics(context, outcome, trial.fold).items():
        run.metric(key, value)
    run.flush()
