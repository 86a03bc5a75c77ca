"""Finished trials without scores on retained data: scored from their saved adapters, without training."""

from __future__ import annotations

import math

from rich.console import Console

from adaptive_lora.errors import AdapterError, brief
from adaptive_lora.models.errors import is_bug
from adaptive_lora.results import EvalResult
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.progress import say_lines
from adaptive_lora.runner.retained import retained_losses, retained_metrics, with_base_scores
from adaptive_lora.serving import load_adapter
from adaptive_lora.tracking import Recorder, Run, StudyRun
from adaptive_lora.tracking.registry import MODEL_TAG, adapter_folder
from adaptive_lora.tracking.runs import RETAINED, SIGNATURE, record_retained


def score_unscored(context: StudyContext, study: StudyRun, console: Console) -> None:
    """Score the finished trials of the grid that lack scores on the study's retained data.

    Such trials were trained before the data were given, or with another version of them. Their adapters are loaded
    from the store; a trial whose adapter cannot be loaded is named, and the comparison counts it.

    Args:
        context: context of the study.
        study: parent run of the study.
        console: receives a line for each trial.
    """
    wanted = {one.digest for one in context.retained}
    signatures = {context.signature(trial) for trial in context.config.trials()} if wanted else set()
    unscored = [
        run
        for run in (study.children() if wanted else ())
        if run.info.status == "FINISHED"
        and run.data.tags.get(SIGNATURE) in signatures
        and not wanted <= set(run.data.tags.get(RETAINED, "").split())
    ]
    if not unscored:
        return
    count = len(unscored)
    who, whose = ("trial has", "its saved adapter is") if count == 1 else ("trials have", "their saved adapters are")
    say_lines(console, [f"{count} finished {who} no scores on the retained data yet; {whose} scored"])
    lost: list[str] = []
    for run in unscored:
        name = str(run.info.run_name)
        try:
            after = _scored(context, run)
        except AdapterError as error:
            lost.append(f"  no scores on the retained data: {name}: {error}")
            continue
        scores = with_base_scores(context, after)
        recorder = Recorder(study.store, run.info.run_id)
        record_retained(recorder, scores, run.data.tags.get(RETAINED, ""))
        for key, value in retained_metrics(scores).items():
            recorder.metric(key, value)
        recorder.leave()
    study.store.settle()
    say_lines(console, lost)


def _scored(context: StudyContext, run: Run) -> dict[str, EvalResult]:
    """Return the scores of a run's saved adapter on the retained data.

    Raises:
        AdapterError: it cannot be loaded back, or gives a loss that is not finite.
    """
    if MODEL_TAG not in run.data.tags:
        raise AdapterError("its run has no adapter")
    try:
        folder = adapter_folder(run.data.tags[MODEL_TAG])
        model, _, _ = load_adapter(folder, trust_remote_code=context.base.reference.trust_remote_code)
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(f"its adapter cannot be loaded back ({brief(error)})") from error
    found = retained_losses(context, model)
    if not all(math.isfinite(result.loss) for result in found.values()):
        raise AdapterError("its loss on them is not finite")
    return found
