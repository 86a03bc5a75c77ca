"""Single steps of a study, for the commands train, evaluate and export."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptive_lora.config import RetainedSource, StudyConfig
from adaptive_lora.errors import ConfigError, DataError, TrialFailed
from adaptive_lora.methods.adapters.export import export_merged, export_uniform
from adaptive_lora.models.errors import model_errors
from adaptive_lora.redaction import shown
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.evaluation import Evaluation, evaluate_saved, load_saved
from adaptive_lora.runner.follow import led_by_first
from adaptive_lora.runner.loaded import adapter_files
from adaptive_lora.runner.measure import as_saved
from adaptive_lora.runner.progress import StudyProgress, say_lines, say_place
from adaptive_lora.runner.retained import retained_metrics
from adaptive_lora.runner.run import missing_trials, opened_study
from adaptive_lora.runner.trial import TrialOutcome, run_tracked
from adaptive_lora.runner.trial_log import log_test_data
from adaptive_lora.tracking import connect
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder
from adaptive_lora.tracking.runs import eval_to_dict, record_retained, single_run


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """The finished run of a trial."""

    study_id: str
    run_id: str
    trial: str
    """Label of the trial."""
    metrics: Mapping[str, float]
    """Name -> last value of each recorded metric."""
    outcome: TrialOutcome | None
    """The outcome, or None if the trial had been finished before."""


def run_train(config: StudyConfig, adapter: Path | None, console: Console) -> TrainedRun:
    """Run the only trial of a configuration as a child of its study.

    Under `mlflow run` the run made for this process becomes the trial's run.

    Args:
        config: settings of one trial.
        adapter: new or empty folder to which the adapter is copied; None: it is in the tracking store only.
        console: receives progress and the ids of the records.

    Raises:
        ConfigError: the folder is not empty, or the configuration has several trials.
        TrialFailed: training was not stable.
    """
    if adapter is not None and adapter.exists() and any(adapter.iterdir()):
        raise ConfigError(f"{adapter} is not empty; give a new folder for the adapter.")
    trial = config.only_trial()
    context = StudyContext(config)
    say_lines(console, context.data_lines())
    outcome = None
    with led_by_first(context), opened_study(context, console, single=True) as study:
        if missing_trials(context, study):
            with StudyProgress(console, 1) as progress:
                earlier = study.unfinished.get(context.signature(trial), ())
                outcome = run_tracked(context, study, trial, progress, earlier=earlier, adopt=True)
        if isinstance(outcome, TrialFailed):
            raise outcome
    run = next(run for run in study.runs_of(context.signature(trial)) if run.info.status == "FINISHED")
    trained = outcome if isinstance(outcome, TrialOutcome) else None
    if trained is None:
        console.print(f"{shown(trial.label)} was finished before; nothing to train", highlight=False)
    if adapter is not None:
        shutil.copytree(adapter_folder(run.data.tags[MODEL_TAG]), adapter, dirs_exist_ok=True)
        console.print(f"adapter written to {shown(adapter)}", highlight=False)
    console.print(
        f"study {study.study_id}, run {run.info.run_id}; compare with "
        f"`adaptive-lora compare --study-id {study.study_id}`",
        highlight=False,
        soft_wrap=True,
    )
    return TrainedRun(
        study_id=study.study_id, run_id=run.info.run_id, trial=trial.label, metrics=run.data.metrics, outcome=trained
    )


def run_evaluate(config: StudyConfig, adapter: str, fold: int, console: Console) -> dict[str, Any]:
    """Load an adapter as in serving, score it on a fold's test split, and return the scores and the data's digest.

    Raises:
        AdapterError: there is no adapter, or its base is not the one that it was trained on.
        ConfigError: the fold does not exist.
        DataError: the data have other classes than the adapter.
    """
    if not 0 <= fold < config.data.folds:
        raise ConfigError(f"fold must be 0 to {config.data.folds - 1}; got {fold}.")
    model, record, config = load_saved(adapter, config)
    context = StudyContext(as_saved(config), trains=False)
    found, required = ([*task.get("labels", ())] for task in (context.base.task, record["task"]))
    if found != required:
        raise DataError(
            f"{context.data.source}: required the classes of the adapter, {', '.join(required)}; got "
            f"{', '.join(found)}. Give data with rows of each, and of no other."
        )
    say_lines(console, context.data_lines())
    model.to(context.runtime.device)
    with model_errors(f"adapter {adapter} does not run on this data", model):
        test = context.score(model, context.splits(fold).test)
    scores = {
        **{f"test/{name}": value for name, value in context.task.metrics(test).items()},
        "test/examples": float(len(test.example_ids)),
    }
    store = connect(config.tracking)
    with single_run(store, "evaluation", f"evaluate·{context.data.source}") as run:
        run.params({"evaluate.adapter": adapter, "evaluate.fold": fold})
        run.tags({"data_digest": context.data.digest})
        log_test_data(context, run, test)
        for key, value in scores.items():
            run.metric(key, value)
        run.flush()
        run.json("evaluation.json", eval_to_dict(test))
    say_place(store, console)
    for key, value in scores.items():
        console.print(f"{key:<24} {value:,.6g}", highlight=False)
    return {**scores, "data_digest": context.data.digest}


def run_evaluate_retained(config: StudyConfig, adapter: str, console: Console) -> list[Evaluation]:
    """Score an adapter and its base on each source of `retain_data`, record both, print the difference and return it.

    Raises:
        AdapterError: there is no adapter, or its base is not the one that it was trained on.
        DataError: a source cannot be read or used.
    """
    texts = config.evaluation.retain_data
    found = [evaluate_saved(config, adapter, RetainedSource.parse(text)) for text in texts]
    store = connect(config.tracking)
    with single_run(store, "evaluation", f"evaluate·{', '.join(one.source for one in found)}"[:250]) as run:
        run.params({"evaluate.adapter": adapter})
        scores = {one.digest: one.scores for one in found}
        record_retained(run, scores)
        for key, value in retained_metrics(scores).items():
            run.metric(key, value)
        run.flush()
    say_place(store, console)
    for one in found:
        say_lines(console, one.reading)
    for one in found:
        say_lines(console, str(one).splitlines())
    return found


def run_export(config: StudyConfig, adapter: str, out: Path, console: Console, *, merged: bool) -> int | None:
    """Write an adapter with one rank, which is returned, or merged into its base.

    Raises:
        AdapterError: there is no adapter, or it cannot be exported in this form.
        ConfigError: the folder is not empty.
    """
    source = adapter_files(adapter, config.tracking)
    if merged:
        export_merged(source, out, trust_remote_code=config.model.trust_remote_code)
        console.print(f"merged model written to {shown(out)}", highlight=False, soft_wrap=True)
        return None
    rank = export_uniform(source, out, trust_remote_code=config.model.trust_remote_code)
    console.print(f"adapter written to {shown(out)}; a server must allow rank {rank}", highlight=False, soft_wrap=True)
    return rank
