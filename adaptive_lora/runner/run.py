"""The run of a study: profile, train, evaluate, compare, register."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import StudyConfig, TrackingConfig, TrialSpec, study_from
from adaptive_lora.errors import AdapterError, AdaptiveLoraError, ModelError, TrackingError, TrialFailed, WorkerError
from adaptive_lora.interruption import interruptible
from adaptive_lora.models.collector import modules_uncollected
from adaptive_lora.redaction import shown
from adaptive_lora.results import EvalResult, TrialRecord
from adaptive_lora.runner.comparison_input import Selection, comparison_input_of, read_comparison_input
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.continued import refuse_changed, refuse_earlier, require_plan
from adaptive_lora.runner.early import require_decidable
from adaptive_lora.runner.engines.outcomes import outcomes_of, require_devices
from adaptive_lora.runner.follow import led_by_first
from adaptive_lora.runner.looks import looks_lines, rounds_until_decided
from adaptive_lora.runner.progress import StudyProgress, say_lines, say_place
from adaptive_lora.runner.provenance import provenance
from adaptive_lora.runner.race import race_rounds, require_rungs
from adaptive_lora.runner.recorded import (
    BASE_SCORES,
    CONFIG,
    DATA,
    EXAMPLES,
    recorded_base_scores,
    settings_to_record,
    study_settings,
)
from adaptive_lora.runner.rescore import score_unscored
from adaptive_lora.runner.result import StudyResult, judge
from adaptive_lora.runner.schedule import Leg
from adaptive_lora.runner.trial import remove_checkpoints
from adaptive_lora.runner.trial_log import log_test_data
from adaptive_lora.tracking import Store, StudyRun, connect
from adaptive_lora.tracking.runs import RETAINED, STUDY_KEY, TOKENS, eval_to_dict, run_name


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOutcome:
    """Outcome of a completed study."""

    study_result: StudyResult
    store: Store

    @property
    def trials_run(self) -> int:
        """Number of trials run by this call; the others had been finished before."""
        return self.study_result.trials_run


def run_study(config: StudyConfig, console: Console | None = None) -> StudyOutcome:
    """Run the missing trials of a study, compare all trials and register the winner.

    Interrupted studies continue: finished trials are found by their signature and skipped.

    Args:
        config: settings, methods, seeds and learning rates.
        console: receives progress and the table; standard output where None.

    Raises:
        AdaptiveLoraError: the study cannot start; nothing is written then.
    """
    console = console or Console()
    require_decidable(config)
    require_devices(config)
    context = StudyContext(config)
    say_lines(console, [*context.data_lines(), *looks_lines(config)])
    if config.race:
        require_rungs(context)
    trials, began = list(config.trials()), set[str]()
    with led_by_first(context), opened_study(context, console) as study:
        require_plan(config, study)
        with (
            StudyProgress(console, len(trials)) as progress,
            modules_uncollected(),
            closing(outcomes_of(context, study, _rounds(context, study, progress, trials), progress)) as outcomes,
        ):
            for leg, outcome in outcomes:
                began.add(leg.trial.label)
                if isinstance(outcome, TrialFailed):
                    progress.end(leg.trial.label, f"[red]FAILED[/]: {shown(outcome)}")
        study.store.settle(" The trials were trained, not compared: then run the same command again.")
        remove_checkpoints(context, trials)  # a process may have been killed between a trial's end and this step
        study.deliver_left()
        score_unscored(context, study, console)
        study_result = judge(comparison_input_of(study), config, console, lambda trial: context)
    study_result = dataclasses.replace(study_result, trials_run=len(began))
    return StudyOutcome(study_result=study_result, store=study.store)


def _rounds(
    context: StudyContext, study: StudyRun, progress: StudyProgress, trials: list[TrialSpec]
) -> Iterator[list[Leg]]:
    """Yield the legs that can be run; trials of seeds that looks add are added to those of the grid."""
    rounds = _grid_rounds(context, study, progress)
    if context.config.until == "decided":
        rounds = rounds_until_decided(context, study, progress, rounds, trials)
    return rounds


def _grid_rounds(context: StudyContext, study: StudyRun, progress: StudyProgress) -> Iterator[list[Leg]]:
    """Yield the legs of the grid that can be run: of a race of learning rates, or all missing trials."""
    if context.config.race:
        yield from race_rounds(context, study, progress)
        return
    missing = missing_trials(context, study)
    progress.skip(len(list(context.config.trials())) - len(missing))
    if missing:
        yield [Leg(trial=trial, earlier=study.unfinished.get(context.signature(trial), ())) for trial in missing]


@contextmanager
def opened_study(context: StudyContext, console: Console, *, single: bool = False) -> Iterator[StudyRun]:
    """Open a study's parent run for the block; it ends FINISHED, FAILED, or KILLED to be continued.

    Ctrl-C and SIGTERM interrupt the block.

    Args:
        context: context of the study.
        console: receives the place of the records.
        single: whether only one trial is run, whose failure is not that of the study.
    """
    resumable = (
        (KeyboardInterrupt,) if single else (KeyboardInterrupt, TrackingError, WorkerError, OSError, MemoryError)
    )
    with interruptible():
        store = connect(context.config.tracking)
        say_place(store, console)
        study = open_study(context, store, single=single, say=lambda line: say_lines(console, [line]))
        status = "FINISHED" if single else "FAILED"
        try:
            yield study
            status = "FINISHED"
        except resumable:
            status = "KILLED"
            raise
        finally:
            study.end(status)


def open_study(
    context: StudyContext, store: Store, *, single: bool = False, say: Callable[[str], None] = lambda line: None
) -> StudyRun:
    """Find or make the study's parent run, take its lease, and record the settings that all trials share.

    Args:
        context: context of the study.
        store: tracking store.
        single: whether only one trial is run: it is added to the recorded grid instead of replacing
            it, and the run of `mlflow run` is the trial's.
        say: receives a line while another command runs the study.

    Raises:
        StudyInUse: another command runs the study.
        ModelError: the base itself has a non-finite loss.
    """
    config = context.config
    base_scores = {str(fold): context.base_scores(fold) for fold in range(config.data.folds)}
    if not all(math.isfinite(result.loss) for result in base_scores.values()):
        raise ModelError(
            f"base {context.base.reference.name} gives a non-finite test loss in "
            f"{context.runtime.precision} before any training; check its weights or use fp32."
        )
    _ = context.retained_before  # data that cannot be used are refused before anything is written
    refuse_changed(context, store)
    refuse_earlier(context, store)
    unnamed = config.study == StudyConfig.study
    study = StudyRun.open(
        store,
        study_id=context.study_id,
        name=run_name(config.study) if unnamed and not single else config.study,
        adopt=not single,
        signature=context.signature(config.only_trial()) if single else "",
        silence=60 * config.tracking.lease_minutes,
        wait=config.tracking.wait,
        say=say,
    )
    try:
        _describe(context, study, base_scores, single=single)
    except BaseException:
        study.end("KILLED")  # to be continued
        raise
    return study


def _describe(context: StudyContext, study: StudyRun, base_scores: Mapping[str, EvalResult], *, single: bool) -> None:
    """Record the settings and facts that all trials share."""
    config, settings = context.config, settings_to_record(context.settings())
    study.json(CONFIG, _widened(study, settings) if single else settings)
    if not (
        single and context.base.quantisation and _has_base_scores(study)
    ):  # the recorded scores may be of the base as saved
        study.json(BASE_SCORES, {fold: eval_to_dict(result) for fold, result in base_scores.items()})
    study.json(EXAMPLES, context.test_texts())
    study.json(DATA, context.data_record())
    retained = list(context.retained_before)
    if single:  # sources of earlier trials are kept
        retained = list(dict.fromkeys([*study.recorded().data.tags.get(RETAINED, "").split(), *retained]))
    study.tags(
        {
            STUDY_KEY: context.study_key,
            "base": context.base.reference.name,
            "base_hash": context.base.reference.content_hash,
            "data": context.data.source,
            "data_digest": context.data.digest,
            TOKENS: context.tokens_digest,
            RETAINED: " ".join(retained),
            "precision": context.runtime.precision,
            "trust_remote_code": str(config.model.trust_remote_code).lower(),
            **{f"provenance.{key}": value for key, value in provenance().items()},
        }
    )
    study.metric("frozen/test_loss", context.base_scores(0).loss)
    study.flush()
    study.data(context.data.source, context.data.digest, config.data.data, len(context.data.examples))
    for scores in base_scores.values():
        log_test_data(context, study, scores)


def _has_base_scores(study: StudyRun) -> bool:
    """Return whether the study's base scores are recorded and can be read."""
    try:
        return recorded_base_scores(study) is not None
    except TrackingError:
        return False


def _widened(study: StudyRun, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose grid includes the methods, seeds and rates recorded before."""
    try:
        before = study_settings(study)
    except TrackingError:
        return settings
    methods: dict[str, str] = {}
    for text in (*before["methods"], *settings["methods"]):
        methods.setdefault(MethodSpec.parse(text).label, text)
    return {
        **settings,
        "methods": list(methods.values()),
        "seeds": list(dict.fromkeys([*before["seeds"], *settings["seeds"]])),
        "lr": list(dict.fromkeys([*before["lr"], *settings["lr"]])),
        "retain_data": list(dict.fromkeys([*before.get("retain_data", []), *settings["retain_data"]])),
        "baseline": before.get("baseline"),
    }


def missing_trials(context: StudyContext, study: StudyRun) -> list[TrialSpec]:
    """Return the trials of the grid that had no finished run when the study was opened."""
    return [trial for trial in context.config.trials() if context.signature(trial) not in study.finished_before]


def compare_study(
    tracking: TrackingConfig, selection: Selection, changes: Mapping[str, object], console: Console
) -> tuple[StudyResult, Store]:
    """Compare finished trials again and register the winner, from the tracking store alone.

    Args:
        tracking: settings of the tracking store.
        selection: trials to compare.
        changes: options that replace the recorded ones (output, registered_model, margin ...).
        console: console for the table.

    Raises:
        TrackingError: there is no such study or trial, or records cannot be read.
        DataError: the trials cannot be compared.
    """
    store = connect(tracking, must_exist=True)
    comparison_input = read_comparison_input(store, selection)
    rules = ("margin", "margin_percent", "correction", "registered_model", "max_forgetting", "max_forgetting_percent")
    recorded = {name: comparison_input.settings[name] for name in rules if name in comparison_input.settings}
    if any(name in changes for name in rules[-2:]):  # one bound in two units
        recorded = {name: value for name, value in recorded.items() if name not in rules[-2:]}
    baseline = changes.get("baseline")
    config = study_from({**recorded, **changes, "baseline": None})
    config = dataclasses.replace(config, baseline=None if baseline is None else str(baseline))
    trust = config.model.trust_remote_code
    try:
        study_result = judge(comparison_input, config, console, lambda trial: _context_of(store, trial, trust))
        store.settle()
    finally:
        store.close()
    return study_result, store


def _context_of(store: Store, trial: TrialRecord, trust_remote_code: bool) -> StudyContext:
    """Load base and data of a trial, which may have been run by others.

    The user who compares decides whether the base's own code is run, not the one who ran the trial.

    Raises:
        AdapterError: they are not available, or not those of the trial.
    """
    try:
        settings = study_settings(StudyRun.find(store, trial.tags["study_id"]))
        # `auto` may be another precision on this machine.
        own = {"precision": trial.tags["precision"], "trust_remote_code": trust_remote_code}
        own["task"] = trial.tags.get("task", "causal")  # `auto` may be ambiguous today
        context = StudyContext(study_from({**settings, **own}))
    except AdaptiveLoraError as error:
        raise AdapterError(
            "an adapter is registered only after a proof on its base and data, and these are not available here: "
            f"{error}"
        ) from error
    for name, here in (("base", "base_hash"), ("data", "data_digest"), ("tokens", TOKENS)):
        required, found = trial.tags.get(here), context.fingerprint[name]
        same = required == found or (name == "base" and context.base.is_recorded_as(str(required)))
        if not same and (required is not None or name != "tokens"):  # version 0.1 recorded no tokens
            raise AdapterError(
                f"an adapter is registered only after a proof on its base and data, and the {name} "
                f"available here differs: required {required}, found {found}."
            )
    return context
