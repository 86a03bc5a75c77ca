"""The run of a study: profile, train, evaluate, compare, register."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from adaptive_lora import __version__
from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import StudyConfig, TrackingConfig, TrialSpec, study_from
from adaptive_lora.config.study import SIGNATURE_VERSION
from adaptive_lora.data.token_cache import asks_for_the_time
from adaptive_lora.errors import (
    AdapterError,
    AdaptiveLoraError,
    ConfigError,
    DataError,
    ModelError,
    TrackingError,
    TrialFailed,
)
from adaptive_lora.interruption import interruptible
from adaptive_lora.models.device import modules_uncollected
from adaptive_lora.redaction import shown
from adaptive_lora.results import EvalResult, TrialRecord
from adaptive_lora.runner.comparison_input import (
    BASE_SCORES,
    CONFIG,
    DATA,
    EXAMPLES,
    Selection,
    comparison_input_of,
    read_comparison_input,
    recorded_base_scores,
    study_settings,
)
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.progress import StudyProgress, say_lines, say_place
from adaptive_lora.runner.provenance import provenance
from adaptive_lora.runner.race import race_rounds, require_rungs
from adaptive_lora.runner.rescore import score_unscored
from adaptive_lora.runner.result import StudyResult, judge
from adaptive_lora.runner.schedule import Leg, Schedule, resolve_engine
from adaptive_lora.runner.trial import run_tracked, trial_checkpoints
from adaptive_lora.runner.trial_log import log_test_data
from adaptive_lora.tracking import Store, StudyRun, connect
from adaptive_lora.tracking.runs import RETAINED, STUDY_ID, STUDY_KEY, TOKENS, eval_to_dict, run_name
from adaptive_lora.tracking.study_run import TrialStatus
from adaptive_lora.training.joint.group import JointGroup


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
    context = StudyContext(config)
    say_lines(console, context.data_lines())
    if config.race:
        require_rungs(context)
    trials, run_here = list(config.trials()), set[str]()
    with opened_study(context, console) as study:
        with StudyProgress(console, len(trials)) as progress, modules_uncollected():
            schedule = _schedule(context, study, progress)
            for group in schedule:
                runs = [
                    partial(run_tracked, context, study, leg.trial, progress, pause_at=leg.pause_at) for leg in group
                ]
                outcomes = JointGroup(runs).run() if len(runs) > 1 else [runs[0]()]
                for leg, outcome in zip(group, outcomes, strict=True):
                    if outcome is TrialStatus.TAKEN:
                        schedule.postpone(leg)
                    elif outcome is not TrialStatus.DONE:
                        run_here.add(leg.trial.label)
                    if isinstance(outcome, TrialFailed):
                        progress.end(leg.trial.label, f"[red]FAILED[/]: {shown(outcome)}")
        study.store.settle(" The trials were trained, not compared: then run the same command again.")
        for trial in trials:  # a process may have been killed between a trial's end and this step
            trial_checkpoints(context, trial).remove()
        with study.comparing():
            score_unscored(context, study, console)
            study_result = judge(comparison_input_of(study), config, console, lambda trial: context)
    study_result = dataclasses.replace(study_result, trials_run=len(run_here))
    return StudyOutcome(study_result=study_result, store=study.store)


def _schedule(context: StudyContext, study: StudyRun, progress: StudyProgress) -> Schedule:
    """Return the schedule of the trials that are not finished: of a race of learning rates, or of the grid."""
    config = context.config
    if config.race:
        return Schedule(race_rounds(context, study, progress), engine="serial", wait=progress.wait)
    missing = missing_trials(context, study)
    progress.skip(len(list(config.trials())) - len(missing))
    engine = resolve_engine(config.engine, context.runtime)
    return Schedule([[Leg(trial=trial) for trial in missing]], engine=engine, wait=progress.wait)


@contextmanager
def opened_study(context: StudyContext, console: Console, *, single: bool = False) -> Iterator[StudyRun]:
    """Open a study's parent run for the block; it ends FINISHED, FAILED, or KILLED to be continued.

    Ctrl-C and SIGTERM interrupt the block.

    Args:
        context: context of the study.
        console: receives the place of the records.
        single: whether only one trial is run, whose failure is not that of the study.
    """
    resumable = (KeyboardInterrupt,) if single else (KeyboardInterrupt, TrackingError, OSError, MemoryError)
    with interruptible():
        store = connect(context.config.tracking)
        say_place(store, console)
        study = open_study(context, store, single=single)
        status = "FINISHED" if single else "FAILED"
        try:
            yield study
            status = "FINISHED"
        except resumable:
            status = "KILLED"
            raise
        finally:
            study.end(status)


def open_study(context: StudyContext, store: Store, *, single: bool = False) -> StudyRun:
    """Find or make the study's parent run, and record the settings that all trials share.

    Args:
        context: context of the study.
        store: tracking store.
        single: whether only one trial is run: it is added to the recorded grid instead of replacing
            it, and the run of `mlflow run` is the trial's.

    Raises:
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
    _refuse_changed(context, store)
    _refuse_earlier(context, store)
    unnamed = config.study == StudyConfig.study
    study = StudyRun.open(
        store,
        study_id=context.study_id,
        name=run_name(config.study) if unnamed and not single else config.study,
        adopt=not single,
        silence=60 * config.tracking.claim_minutes,
    )
    try:
        _describe(context, study, base_scores, single=single)
    except BaseException:
        study.end("KILLED")  # to be continued
        raise
    return study


def _describe(context: StudyContext, study: StudyRun, base_scores: Mapping[str, EvalResult], *, single: bool) -> None:
    """Record the settings and facts that all trials share."""
    config, settings = context.config, context.settings()
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


def _refuse_changed(context: StudyContext, store: Store) -> None:
    """Refuse a study whose base, data or rendered text changed under the same name since it began.

    Otherwise its finished trials would silently be ignored, and a new study begun under their name.

    Raises:
        DataError, ModelError: data or base changed; the message has both digests.
        ConfigError: the study began before identities included the text, so that a change cannot be
            detected.
    """
    earlier = StudyRun.of_study_key(store, context.study_key)
    if not earlier or any(run.data.tags[STUDY_ID] == context.study_id for run in earlier):
        return
    tags, reference = earlier[0].data.tags, context.base.reference
    way = (
        f"since study {tags[STUDY_ID]} began. Restore it to continue that study, or begin a new "
        "one with another name: --study NAME."
    )
    if not context.base.is_recorded_as(tags["base_hash"]):
        raise ModelError(
            f"base {reference.name} changed (SHA-256 {tags['base_hash'][:16]} then, "
            f"{reference.content_hash[:16]} now) {way}"
        )
    data = context.config.data.data
    if tags["data_digest"] != context.data.digest:
        raise DataError(f"data {data} changed (digest {tags['data_digest']} then, {context.data.digest} now) {way}")
    if TOKENS not in tags or tags["base_hash"] != reference.content_hash:
        version = tags.get("provenance.adaptive_lora", "0.1")
        raise ConfigError(
            f"study {tags[STUDY_ID]} was begun by adaptive-lora {version} before the identity of a "
            f"trial included chat template and token ids. This is {__version__}, which does not "
            "continue it: begin a new study, --study NAME."
        )
    raise DataError(
        f"the token ids or loss masks of data {data} changed (digest {tags[TOKENS]} "
        f"then, {context.tokens_digest} now){_why_other_tokens(context)} {way}"
    )


def _why_other_tokens(context: StudyContext) -> str:
    """Return possible reasons for other tokens of the same data on the same base, for a message."""
    if asks_for_the_time(context.base.tokenizer):
        return ", because the base's chat template writes the date or time,"
    versions = "by another version of transformers or of adaptive-lora"
    if context.data.test is not None:
        return f", {versions}, or because examples moved between data and test data,"
    return f", {versions},"


def _refuse_earlier(context: StudyContext, store: Store) -> None:
    """Refuse to continue a study of version 0.1, whose trials had another scaling by default.

    Raises:
        ConfigError: it is such a study; the message has both versions and policies.
    """
    if StudyRun.of_study_key(store, context.study_key):
        return  # restarted by this version
    for study_key in context.earlier_study_keys():
        for run in StudyRun.of_study_key(store, study_key):
            tags, name = run.data.tags, run.data.tags[STUDY_ID]
            version = tags.get("provenance.adaptive_lora", "0.1")
            settings = study_settings(StudyRun.find(store, name))
            raise ConfigError(
                f"study {name} was begun by adaptive-lora {version} with scaling "
                f"{settings.get('scaling', 'constant')} (trial signatures of version 2). This is "
                f"{__version__} with scaling {context.config.train.scaling} (version "
                f"{SIGNATURE_VERSION}), which does not continue it. Begin a new study: --study "
                f"NAME, with --scaling constant for the earlier default. What is stored can be "
                f"compared: `adaptive-lora compare --study-id {name}`."
            )


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
    """Return the trials of the grid that have no finished run."""
    finished = study.finished()
    return [trial for trial in context.config.trials() if context.signature(trial) not in finished]


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
