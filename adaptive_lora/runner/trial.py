"""The run of one trial: alone (`run_trial`), and recorded in a study (`run_tracked`)."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from adaptive_lora.allocation import Plan
from adaptive_lora.config import TrialSpec
from adaptive_lora.config.storage import is_url
from adaptive_lora.errors import TrialFailed
from adaptive_lora.interruption import TrainingPaused
from adaptive_lora.methods.adapters import audit_as_built, save_adapter
from adaptive_lora.methods.base import RankEvent, TrainedTrial
from adaptive_lora.methods.importance import ImportanceProfile
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.threads import shared_cores
from adaptive_lora.results import EvalResult, TrainResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.follow import announce
from adaptive_lora.runner.progress import StudyProgress
from adaptive_lora.runner.retained import retained_losses
from adaptive_lora.runner.trial_context import TrialOnBase
from adaptive_lora.runner.trial_log import failure_logged, log_outcome, log_settings, log_step, trial_tags
from adaptive_lora.tracking import Run, StudyRun
from adaptive_lora.tracking.runs import PAUSED, RACE, RACE_STEP, run_name
from adaptive_lora.training import Frequency, StepEvent, TrialCheckpoints
from adaptive_lora.training.mirror import CheckpointMirror

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
    retained: Mapping[str, EvalResult]
    """Digest of retained data -> scores of the adapter; empty without `retain_data`."""


def run_tracked(
    context: StudyContext,
    study: StudyRun,
    trial: TrialSpec,
    progress: StudyProgress,
    *,
    earlier: Sequence[Run] | None = None,
    adopt: bool = False,
    pause_at: int | None = None,
) -> TrialOutcome | TrialFailed | TrainingPaused:
    """Run a trial under its own MLflow run, from its last checkpoint on.

    Args:
        context: context of the study.
        study: parent run of the study.
        trial: trial to run.
        progress: progress display.
        earlier: runs of the trial that are known, newest first; None: the store is asked.
        adopt: whether to use the run that `mlflow run` made for this process, if there is one.
        pause_at: optimiser step at which it is paused with a checkpoint; None: it is not paused.

    Returns:
        The outcome; the failure of a training that was not stable, with which a study continues; or
        `TrainingPaused` if it is paused.

    Raises:
        LeaseLost: another command took the study over.
    """
    name = run_name(trial.label) if adopt else trial.label
    run = study.begin_trial(name, trial_tags(context, trial), earlier=earlier, adopt=adopt)
    progress.begin(trial.label)
    checkpoints = trial_checkpoints(context, trial)

    def on_step(event: StepEvent) -> None:
        study.check()
        progress.step(trial.label, event)
        log_step(run, event)
        if event.step == pause_at:
            run.tags({RACE: PAUSED, RACE_STEP: str(event.step)})
            raise TrainingPaused

    log = partial(log_outcome, context, run, trial)
    try:
        with study.trial(run), shared_cores():
            log_settings(context, run, trial)
            with failure_logged(run), checkpoints.workplace() as folder:
                announce(context, trial, pause_at)
                outcome = run_trial(context, trial, folder / "adapter", on_step, checkpoints, log)
    except TrainingPaused as pause:
        return pause.with_traceback(None)
    except TrialFailed as failure:
        checkpoints.remove()  # continuing from it would only fail again
        return failure.with_traceback(None)  # whose frames hold the model
    checkpoints.remove()
    progress.end(trial.label, _summary(outcome))
    return outcome


def _summary(outcome: TrialOutcome) -> str:
    """Return the line shown for a finished trial."""
    test = outcome.test
    exact = "" if test.exact_match is None else f"  exact match {test.exact_match:6.1%}"
    skipped = f"  [red]{outcome.train.skipped_steps} steps skipped[/]" if outcome.train.skipped_steps else ""
    return f"test loss {test.loss:.4f}{exact}  {outcome.seconds:.1f} s{skipped}"


def trial_checkpoints(context: StudyContext, trial: TrialSpec) -> TrialCheckpoints:
    """Return a trial's checkpoints, in a folder of its signature inside one of the study."""
    config = context.config.tracking
    home = Path(config.checkpoints or Path(config.output) / "checkpoints")
    mirror = None
    if config.checkpoints and is_url(config.checkpoints):
        home = Path(config.output) / "checkpoints"
        mirror = CheckpointMirror(config.checkpoints, _mirrored_name(context, trial))
    return TrialCheckpoints(
        home / context.study_id / context.signature(trial),
        Frequency(minutes=config.checkpoint_minutes, steps=config.checkpoint_steps),
        mirror,
    )


def _mirrored_name(context: StudyContext, trial: TrialSpec) -> str:
    """Return the name of a trial's folder in a storage, where nothing is left of a folder that was emptied."""
    return f"{context.study_id}-{context.signature(trial)}"


def remove_checkpoints(context: StudyContext, trials: Iterable[TrialSpec]) -> None:
    """Remove the checkpoints that trials have left; a storage is asked once for all, not once for each."""
    mirrored: set[str] | None = None
    for trial in trials:
        checkpoints = trial_checkpoints(context, trial)
        if checkpoints.mirror is not None and mirrored is None:
            mirrored = checkpoints.mirror.trials()
        if checkpoints.folder.exists() or _mirrored_name(context, trial) in (mirrored or ()):
            checkpoints.remove()


def run_trial(
    context: StudyContext,
    trial: TrialSpec,
    folder: Path,
    on_step: Callable[[StepEvent], None] = lambda event: None,
    checkpoints: TrialCheckpoints | None = None,
    log: Callable[[TrialOutcome], None] = lambda outcome: None,
) -> TrialOutcome:
    """Run a trial on the shared base, which has no adapters afterwards: plan, attach, fit, audit, score, save, log.

    Args:
        context: base, data and plans.
        trial: trial to run.
        folder: folder for the adapter.
        on_step: function called after every optimiser step.
        checkpoints: checkpoints of this trial, from which it continues; None: it cannot be resumed.
        log: function that records the outcome.

    Raises:
        TrialFailed: training was not stable.
        AdapterError: the model as built differs from the plan, or a site was not changed by training.
        ModelError: a library raised while the trial was attached, trained or scored.
    """
    started = time.perf_counter()
    context = context.on_base(trial.method.base)
    trial_context = TrialOnBase(context, trial, on_step, checkpoints)
    processes = context.runtime.processes
    try:
        with model_errors(f"{trial.label} on {context.architecture.kind} failed", context.base.model):
            with processes.one_trial():
                trained = trial.method.options.fit(trial_context)  # its method plans, attaches and fits
                _require_finite("validation", trained.result.validation_loss)
                audit_as_built(trained.model, trained.plan, trial_context.head)
                test = context.score(trained.model, context.splits(trial.fold).test)
                _require_finite("test", test.loss)
                test = dataclasses.replace(test, overall={**test.overall, **context.task.plan_scores(trained.plan)})
                retained = retained_losses(context, trained.model)
                for result in retained.values():
                    _require_finite("retained data's", result.loss)
                probe = probe_logits(context, trained.model, trial.fold)
            if processes.leads:
                _save(context, trained, probe, folder)
    finally:
        trial_context.release()
    before = 0.0 if checkpoints is None else checkpoints.seconds_before
    outcome = TrialOutcome(
        plan=trained.plan,
        profile=context.profile_of(trial.method, seed=trial.seed, fold=trial.fold),
        train=trained.result,
        test=test,
        folder=folder,
        seconds=before + time.perf_counter() - started - trained.result.waited_seconds,
        training_parameters=trained.training_parameters,
        history=trained.history,
        search_seconds=trained.search_seconds,
        trainings=trial_context.trainings,
        extra=trained.extra,
        retained=retained,
    )
    log(outcome)
    return outcome


def _require_finite(part: str, loss: float) -> None:
    """Raise TrialFailed for a non-finite loss; the guard does not check the weights after the last step."""
    if not math.isfinite(loss):
        raise TrialFailed(
            f"{part} loss is {loss:g} after training. Lower the learning rate or use precision bf16 or fp32."
        )


def _save(context: StudyContext, trained: TrainedTrial, probe: torch.Tensor, folder: Path) -> None:
    """Write the adapter and its probe; raises OSError where the disk is full, also where safetensors says so."""
    try:
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
        save_file({"logits": probe}, folder / PROBE)
    except SafetensorError as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def probe_logits(context: StudyContext, model: Any, fold: int) -> torch.Tensor:
    """Return the task's outputs for the first test examples, shape (up to 4, ...), float32.

    The reloaded adapter must give equal outputs.
    """
    return context.task.probe(model, context.splits(fold).test)
